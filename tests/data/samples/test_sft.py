from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.config.schema import DatasetConfig
from engine.data.samples.sft import SEGMENT, SftDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import ConfigError, DataError

S = 32


def write(prefix: Path, lengths: list[int], first: int = 0, masked: bool = True) -> Path:
    """Conversation j has the tokens 100 (first + j) + 0, 1, 2, ...; those at odd places are targets."""
    with IndexedDatasetWriter(prefix, np.uint16, masked=masked) as writer:
        for j, length in enumerate(lengths, first):
            mask = np.arange(length) % 2 == 1
            writer.add_document(100 * j + np.arange(length), mask if masked else None)
    return prefix


def dataset(*prefixes: Path, weights=None, split=(1, 0, 0), part="train", seed=1, **options) -> SftDataset:
    weights = weights or [1] * len(prefixes)
    chosen = [DatasetConfig(path=path, weight=weight) for path, weight in zip(prefixes, weights, strict=True)]
    return SftDataset(chosen, split, part, S, seed, **options)


def read(data: SftDataset, i: int) -> list[int]:
    """The conversations of a row, after looking at every place of it."""
    row = data.sample(i)
    edges = [0, *row.boundaries.tolist(), S]
    found, empty = [], False
    for start, stop in pairwise(edges):
        tokens, labels, targets = (x[start:stop].tolist() for x in (row.tokens, row.labels, row.target_mask))
        if tokens == [0] * (stop - start):
            assert not any(targets) and labels == tokens  # what was left over
            assert stop - start <= SEGMENT
            empty = True
            continue
        assert not empty
        j = labels[0] // 100
        assert tokens == list(range(100 * j, 100 * j + len(tokens)))
        assert labels == [token + 1 for token in tokens]
        assert targets == [label % 2 == 1 for label in labels]
        found.append(j)
    return found


def epoch(data: SftDataset, number: int) -> list[list[int]]:
    return [read(data, i) for i in range(number * data.num_rows, (number + 1) * data.num_rows)]


LENGTHS = np.random.default_rng(0).integers(2, S + 2, 60).tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_every_epoch_reads_every_conversation_once_and_whole(tmp_path, packed):
    data = dataset(write(tmp_path / "a", LENGTHS, first=1), packed=packed)
    epochs = [epoch(data, number) for number in range(3)]
    for rows in epochs:
        assert sorted(j for row in rows for j in row) == list(range(1, 61))
        assert packed or all(len(row) == 1 for row in rows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert data.num_conversations == 60
    filled = sum(length - 1 for length in LENGTHS)
    assert data.num_tokens == filled and data.packing.efficiency == filled / (data.num_rows * S)


def test_what_shares_a_row_changes_with_the_epoch_and_the_seed(tmp_path):
    path = write(tmp_path / "a", [5] * 60, first=1)

    def together(data, number):
        return {frozenset(row) for row in epoch(data, number)}

    one = dataset(path)
    assert together(one, 0) != together(one, 1)
    assert together(one, 0) == together(dataset(path), 0)
    assert together(one, 0) != together(dataset(path, seed=2), 0)


def test_weights_are_how_often_an_epoch_reads_a_conversation(tmp_path):
    a, b = write(tmp_path / "a", [7] * 10, first=1), write(tmp_path / "b", [9] * 5, first=11)
    data = dataset(a, b, weights=[1, 3])
    seen = Counter(j for row in epoch(data, 0) for j in row)
    assert seen == Counter({**dict.fromkeys(range(1, 11), 1), **dict.fromkeys(range(11, 16), 3)})
    assert data.passes(2 * data.num_rows) == [2, 6]
    for weight in (0.5, 1e9):
        with pytest.raises(ConfigError, match=rf"b: weight = {weight}; .*expected a whole number up to 1000"):
            dataset(a, b, weights=[1, weight])


def test_rows_behind_the_last_epoch_are_empty(tmp_path):
    data = dataset(write(tmp_path / "a", LENGTHS, first=1), epochs=2)
    assert read(data, 2 * data.num_rows - 1)
    row = data.sample(2 * data.num_rows)
    assert not row.tokens.any() and not row.target_mask.any() and not row.boundaries.size
    data.seq_length = 2 * SEGMENT + 1
    assert data.sample(2 * data.num_rows).boundaries.tolist() == [SEGMENT, 2 * SEGMENT]


def test_parts_share_no_conversation_and_do_not_depend_on_the_seed(tmp_path):
    path = write(tmp_path / "a", [5] * 100, first=1)
    parts = {}
    for part in ("train", "valid", "test"):
        data = [dataset(path, split=(80, 15, 5), part=part, seed=seed) for seed in (1, 2)]
        seen = [sorted(j for row in epoch(one, 0) for j in row) for one in data]
        assert seen[0] == seen[1]
        parts[part] = seen[0]
    assert [len(part) for part in parts.values()] == [80, 15, 5]
    assert sorted(j for part in parts.values() for j in part) == list(range(1, 101))
    assert parts["train"] != list(range(1, 81))  # dealt out, not cut


@pytest.mark.parametrize(
    ("count", "split", "expected"),
    [
        (20, (98, 2, 0), [19, 1, 0]),
        (20, (98, 1, 1), [18, 1, 1]),
        (2, (98, 1, 1), [1, 0, 1]),
        (1, (98, 1, 1), [1, 0, 0]),
        (50, (90, 10, 0), [45, 5, 0]),
    ],
)
def test_a_small_share_of_a_few_conversations_is_one(tmp_path, count, split, expected):
    path = write(tmp_path / "a", [5] * count, first=1)
    sizes = []
    for part in ("train", "valid", "test"):
        try:
            sizes.append(dataset(path, split=split, part=part).num_conversations)
        except DataError:
            sizes.append(0)
    assert sizes == expected


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"plain has no \.mask\.bin.*task = sft"):
        dataset(write(tmp_path / "plain", [5], masked=False))
    with pytest.raises(DataError, match=r"long: conversation 1 has 40 tokens.*raise that to 39.*max_length = 33"):
        dataset(write(tmp_path / "long", [5, 40, 3]))
    with pytest.raises(DataError, match=r"no conversation for the valid part of data\.split"):
        dataset(write(tmp_path / "one", [5]), split=(1, 0.1, 0), part="valid")
    with pytest.raises(DataError, match="no conversation"):
        dataset(write(tmp_path / "short", [1, 0]))  # nothing to predict


def test_the_fingerprint_follows_data_and_order_but_not_the_directory(tmp_path):
    a = write(tmp_path / "a", LENGTHS)
    same = [dataset(a), dataset(write(tmp_path / "moved" / "a", LENGTHS))]
    other = [
        dataset(a, seed=2),
        dataset(a, packed=False),
        dataset(a, split=(1, 1, 0)),
        dataset(a, a),
        dataset(a, weights=[2]),
        dataset(write(tmp_path / "other" / "a", LENGTHS[:-1])),
    ]
    assert len({data.fingerprint() for data in same}) == 1
    assert len({data.fingerprint() for data in [*same, *other]}) == 1 + len(other)

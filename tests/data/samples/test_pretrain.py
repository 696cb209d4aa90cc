"""Samples as a function of their number: coverage, order, splits, and the cost of 10^12 tokens."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.config.schema import DatasetConfig
from engine.data.samples.pretrain import PretrainDataset
from engine.data.samples.sample import part_documents
from engine.data.storage.format import HEADER, MAGIC
from engine.data.storage.info import DatasetInfo
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import ConfigError, DataError

ALL = (1.0, 0.0, 0.0)


def write(prefix: Path, lengths, first: int = 0, info: DatasetInfo | None = None) -> Path:
    """A dataset whose tokens count upwards from `first`, so that a token tells where it is from."""
    with IndexedDatasetWriter(prefix, np.int32, info) as writer:
        writer.add_documents(first + np.arange(sum(lengths)), lengths)
    return prefix


def dataset(*paths: Path, weights=None, split=ALL, part="train", seq_length=8, seed=1) -> PretrainDataset:
    weights = weights or [1.0] * len(paths)
    configs = [DatasetConfig(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
    return PretrainDataset(configs, split, part, seq_length, seed)


def test_an_epoch_reads_everything_once_and_the_next_moves_the_cuts(tmp_path):
    data = dataset(write(tmp_path / "web", [10, 30, 25, 40]))  # 105 tokens: 12 samples of 8 an epoch
    offsets = set()
    for epoch in range(60):
        places = [data.where(i) for i in range(epoch * 12, (epoch + 1) * 12)]
        assert {place.epoch for place in places} == {epoch}
        assert sorted(place.number for place in places) == list(range(12))
        offset = min(place.start for place in places)
        assert sorted(place.start for place in places) == [offset + 8 * k for k in range(12)]
        offsets.add(offset)
    assert offsets == set(range(8))


def test_a_sample_is_its_tokens_and_the_next_one(tmp_path):
    data = dataset(write(tmp_path / "web", [10, 30, 0, 25, 40]))
    for i in range(40):
        sample, start = data.sample(i), data.where(i).start
        assert sample.tokens.tolist() == list(range(start, start + 8))
        assert sample.labels.tolist() == list(range(start + 1, start + 9))
        assert sample.tokens.dtype == sample.labels.dtype == np.int64
        assert sample.boundaries.tolist() == [b - start for b in (10, 40, 65) if start < b < start + 8]


def test_the_smallest_dataset_that_holds_a_sample(tmp_path):
    data = dataset(write(tmp_path / "web", [16]))
    assert {data.where(i).start for i in range(100)} == set(range(8))  # one sample an epoch, at any offset
    assert data.sample(5).tokens.max() <= 15
    with pytest.raises(DataError, match=r"few: the train part has 15 tokens and needs 16 for data\.seq_length = 8"):
        dataset(write(tmp_path / "few", [15]))


@pytest.mark.parametrize(
    ("lengths", "split", "advice"),
    [
        (
            [999],
            (90, 10, 0),
            "the data have 1 document: cut the text .* --data.split '.1, 0, 0.' --train.eval_steps 0$",
        ),
        ([500, 499], (90, 10, 0), "the data have 2 documents: cut the text into more documents"),
        ([], (90, 10, 0), r"change data.split = \[90, 10, 0\] \(0 documents, 0 tokens in all\)$"),
        ([990, 9], (50, 50, 0), r"change data.split = \[50, 50, 0\] \(2 documents, 999 tokens in all\)$"),
    ],
)
def test_a_part_without_documents_is_not_helped_by_another_split(tmp_path, lengths, split, advice):
    with pytest.raises(DataError, match=f"the valid part has . tokens and needs 16 .*{advice}"):
        dataset(write(tmp_path / "web", lengths), split=split, part="valid")


def test_the_order_depends_on_seed_name_and_epoch_only(tmp_path):
    web = write(tmp_path / "web", [400])
    starts = [dataset(web).where(i).start for i in range(49)]
    assert starts == [dataset(web).where(i).start for i in range(49)]
    assert starts != sorted(starts)
    assert starts != [dataset(web, seed=2).where(i).start for i in range(49)]
    assert [dataset(web).where(i).number for i in range(49)] != [dataset(web).where(i).number for i in range(49, 98)]
    moved = write(tmp_path / "elsewhere" / "web", [400])
    assert starts == [dataset(moved).where(i).start for i in range(49)]
    renamed = write(tmp_path / "code", [400])
    assert starts != [dataset(renamed).where(i).start for i in range(49)]


def test_datasets_of_one_name_have_orders_of_their_own(tmp_path):
    data = dataset(write(tmp_path / "a" / "web", [400]), write(tmp_path / "b" / "web", [400], first=1000))
    numbers: dict[int, list[int]] = {0: [], 1: []}
    for i in range(98):
        numbers[data.where(i).dataset].append(data.where(i).number)
    assert sorted(numbers[0]) == sorted(numbers[1]) == list(range(49))
    assert numbers[0] != numbers[1]


def test_a_mixture_reads_each_dataset_epoch_after_epoch_in_the_stated_proportions(tmp_path):
    sets = [write(tmp_path / "web", [400]), write(tmp_path / "code", [100, 100], first=1000)]
    data = dataset(*sets, weights=[3, 1])
    places = [data.where(i) for i in range(400)]
    assert Counter(place.name for place in places) == {"web": 300, "code": 100}
    for name, per_epoch in ("web", 49), ("code", 24):
        own = [place for place in places if place.name == name]
        assert [place.epoch for place in own] == [k // per_epoch for k in range(len(own))]
        assert sorted(place.number for place in own[:per_epoch]) == list(range(per_epoch))
    assert data.passes(400) == pytest.approx([300 / 49, 100 / 24])
    sample = data.sample(next(i for i in range(400) if places[i].name == "code"))
    assert sample.tokens.min() >= 1000


@pytest.mark.parametrize(
    "split, cuts",
    [
        ((98, 1, 1), [0, 98, 99, 100]),
        ((0.8, 0.1, 0.1), [0, 80, 90, 100]),
        ((1, 1, 1), [0, 33, 67, 100]),
        ((100, 0, 0), [0, 100, 100, 100]),
        ((0.994, 0.003, 0.003), [0, 99, 100, 100]),  # shares are rounded cumulatively
    ],
)
def test_parts_are_contiguous_documents_and_together_everything(split, cuts):
    parts = [part_documents(100, split, part) for part in ("train", "valid", "test")]
    assert parts == list(pairwise(cuts))


def test_parts_do_not_share_tokens(tmp_path):
    web = write(tmp_path / "web", [20] * 30)
    seen = {}
    for part in ("train", "valid", "test"):
        data = dataset(web, split=(80, 10, 10), part=part)
        seen[part] = {token for i in range(300) for token in data.sample(i).tokens.tolist()}
    assert max(seen["train"]) < 480 <= min(seen["valid"]) <= max(seen["valid"]) < 540 <= min(seen["test"])


@pytest.mark.parametrize("split", [(-1, 1, 1), (0, 0, 0), (math.inf, 1, 1), (1, math.nan, 0)])
def test_shares_that_make_no_sense(tmp_path, split):
    with pytest.raises(ConfigError, match=r"data\.split"):
        dataset(write(tmp_path / "web", [100]), split=split)


def test_negative_sample_numbers_are_refused(tmp_path):
    with pytest.raises(IndexError, match="-1"):
        dataset(write(tmp_path / "web", [100])).sample(-1)


def test_a_copy_gives_the_same_samples(tmp_path):
    data = dataset(write(tmp_path / "web", [100]))
    assert copy.deepcopy(data).sample(3).tokens.tolist() == data.sample(3).tokens.tolist()


def test_the_fingerprint_follows_data_and_order_but_not_the_directory(tmp_path):
    web, code = write(tmp_path / "web", [100, 50]), write(tmp_path / "code", [100])
    same = [dataset(web), dataset(write(tmp_path / "moved" / "web", [100, 50]))]
    other = [
        dataset(web, seed=2),
        dataset(web, seq_length=7),
        dataset(web, split=(1, 1, 0)),
        dataset(web, code),
        dataset(web, code, weights=[1, 2]),
        dataset(code, web),
        dataset(write(tmp_path / "longer" / "web", [100, 51])),
        dataset(write(tmp_path / "retokenized" / "web", [100, 50], first=1)),
    ]
    assert len({data.fingerprint() for data in same}) == 1
    assert len({data.fingerprint() for data in [*same, *other]}) == 1 + len(other)


# ---- 10^12 tokens

MEASURE = """
import json, sys, time
from itertools import pairwise
from pathlib import Path
from engine.config.schema import DatasetConfig
from engine.data.samples.pretrain import PretrainDataset
from engine.data.samples.vocabulary import check_vocabulary

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

def seconds(numbers):
    start = time.perf_counter()
    for i in numbers:
        data.sample(i)
    return time.perf_counter() - start

before, start = resident_mb(), time.perf_counter()
data = PretrainDataset([DatasetConfig(path=sys.argv[1])], (98, 1, 1), "train", 4096, 1)
first_batch = [data.sample(i).tokens for i in range(256)]
first_s = time.perf_counter() - start
check_vocabulary(data.datasets[0], 100), data.fingerprint()
near = far = float("inf")
for repeat in range(5):
    near = min(near, seconds(range(300)))
    far = min(far, seconds(range(10**11, 10**11 + 300)))
print(json.dumps({"first_s": first_s, "growth_mb": resident_mb() - before, "near_s": near, "far_s": far}))
"""


@pytest.mark.parametrize("sequences, per_document", [(1000, 1), (200_000, 4), (1, 1)], ids=["plain", "many", "one"])
def test_a_trillion_tokens_cost_nothing_to_open(tmp_path, sequences, per_document):
    total = 10**12 if sequences > 1 else 2**31 - 1  # a sequence cannot be longer
    length = total // sequences
    with (tmp_path / "big.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, sequences, sequences // per_document + 1))
        np.full(sequences, length, "<i4").tofile(file)
        (np.arange(sequences, dtype="<i8") * length * 2).tofile(file)
        np.arange(0, sequences + 1, per_document, dtype="<i8").tofile(file)
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(sequences * length * 2)
    assert (tmp_path / "big.bin").stat().st_blocks * 512 < 1e6  # sparse: the disk is not used
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    cost = json.loads(measured.stdout)
    assert cost["first_s"] < 1
    assert cost["growth_mb"] < 50
    assert cost["far_s"] < 3 * cost["near_s"]

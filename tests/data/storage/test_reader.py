"""Reading datasets: boundaries, masks, and the distrust of the reader."""

import copy
import itertools
import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from engine.data.storage import format as storage_format
from engine.data.storage import reader
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import DataError, DataFormatError
from tests.data.storage.raw import INTEGER_TYPES, index_bytes, put, some


@pytest.mark.parametrize("code", INTEGER_TYPES)
@pytest.mark.parametrize("modes", [b"", b"\x00\x01\x00\x00"], ids=["plain", "modes"])
def test_a_foreign_file_with_documents_of_several_sequences(tmp_path, code, modes):
    dtype = np.dtype(INTEGER_TYPES[code])
    ids = np.arange(100, 109).astype(dtype)
    index = index_bytes([2, 3, 0, 4], [0, 2, 2, 4], code=code, itemsize=dtype.itemsize, modes=modes)
    data = IndexedDataset(put(tmp_path, index, ids.tobytes()))
    assert (data.num_sequences, data.num_documents, data.num_tokens, data.dtype) == (4, 3, 9, dtype)
    assert data.tokens(0, 9).tolist() == list(range(100, 109))
    assert data.tokens(4, 2).tolist() == [104, 105]
    assert [data.document_start(j) for j in range(4)] == [0, 5, 5, 9]
    assert data.document_starts_in(0, 9).tolist() == [5]
    assert np.concatenate(list(data.document_lengths())).tolist() == [5, 0, 4]
    assert [data.document_at(i) for i in (0, 4, 5, 8)] == [0, 0, 2, 2]
    data.verify(109)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_boundaries_agree_with_a_plain_count(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(storage_format, "CHUNK", chunk)
    monkeypatch.setattr("engine.data.storage.files.CHUNK", chunk)
    draw = random.Random(3)
    lengths = [draw.choice([0, 0, 1, 2, 9]) for _ in range(60)]
    documents = sorted([0, 60] + [draw.randrange(61) for _ in range(30)])
    total = sum(lengths)
    data = IndexedDataset(put(tmp_path, index_bytes(lengths, documents), bytes(2 * total)))
    starts = [sum(lengths[:first]) for first in documents]
    assert [data.document_start(j) for j in range(len(documents))] == starts
    assert np.concatenate(list(data.document_lengths())).tolist() == np.diff(starts).tolist()
    for start in range(total):
        assert starts[data.document_at(start)] <= start < starts[data.document_at(start) + 1]
        for stop in (start, start + 1, start + 5, total):
            expected = sorted({x for x in starts[:-1] if start < x < stop})
            assert data.document_starts_in(start, stop).tolist() == expected


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_datasets_without_tokens(tmp_path, lengths):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_documents(np.array([], np.int64), lengths)
        writer.add_documents([], [])
    data = IndexedDataset(tmp_path / "set")
    assert (data.num_tokens, data.num_documents, data.num_sequences) == (0, len(lengths), len(lengths))
    assert data.tokens(0, 0).tolist() == []
    assert data.document_starts_in(0, 0).tolist() == []
    assert [x for chunk in data.document_lengths() for x in chunk] == lengths
    data.verify(10)


def test_a_copy_in_another_process_opens_the_files_by_name(tmp_path):
    # copying takes the same way as pickling
    assert copy.copy(IndexedDataset(some(tmp_path))).tokens(1, 2).tolist() == [8, 9]


@pytest.mark.parametrize("start, count", [(-1, 2), (4, 2), (0, 6), (0, -1)])
def test_tokens_outside_the_dataset(tmp_path, start, count):
    with pytest.raises(IndexError, match="of 5"):
        IndexedDataset(some(tmp_path)).tokens(start, count)


FIVE = struct.pack("<5H", 7, 8, 9, 10, 11)
DAMAGED = {
    "empty": (b"", FIVE, r"idx: size = 0 bytes; expected at least 34"),
    "short header": (index_bytes([5], [0, 1])[:20], FIVE, r"idx: size = 20"),
    "magic": (b"GARBAGE!!" + index_bytes([5], [0, 1])[9:], FIVE, r"idx: magic = b'GARBAGE!!'; expected b'MMIDIDX"),
    "version": (index_bytes([5], [0, 1], version=2), FIVE, r"version = 2; expected 1"),
    "unknown type": (index_bytes([5], [0, 1], code=9), FIVE, r"dtype code = 9"),
    "float64": (index_bytes([5], [0, 1], code=6), FIVE, r"dtype = float64; expected an integer type"),
    "float32": (index_bytes([5], [0, 1], code=7), FIVE, r"dtype = float32; expected an integer type"),
    "huge counts": (index_bytes([5], [0, 1], n=(1 << 64) - 1, d=1 << 63), FIVE, r"idx: size = 62 bytes; expected"),
    "counts that overflow": (index_bytes([5], [0, 1], n=1 << 62), FIVE, r"idx: size = 62 bytes; expected"),
    "cut": (index_bytes([5], [0, 1])[:-1], FIVE, r"idx: size = 61 bytes; expected 62 \(63 with modes\)"),
    "no document index": (index_bytes([5], []), FIVE, r"document count = 0"),
    "negative length": (index_bytes([6, -1, 0], [0, 3], pointers=[0, 12, 10]), FIVE, r"lengths\[1\] = -1"),
    "negative last length": (index_bytes([6, -1], [0, 2]), FIVE, r"lengths\[1\] = -1; expected 0 or more"),
    "first pointer": (index_bytes([5], [0, 1], pointers=[2]), FIVE, r"pointers\[0\] = 2; expected 0"),
    "gap": (index_bytes([1, 2, 1], [0, 3], pointers=[0, 4, 8]), FIVE, r"pointers\[1\] = 4; expected the end"),
    "odd": (index_bytes([1, 2, 2], [0, 3], pointers=[0, 3, 6]), FIVE, r"pointers\[1\] = 3"),
    "wild": (index_bytes([1, 2, 2], [0, 3], pointers=[0, 1 << 62, 6]), FIVE, r"pointers\[1\] = 46116"),
    "first document": (index_bytes([5], [1, 1]), FIVE, r"documents\[0\] = 1; expected 0"),
    "last document": (index_bytes([5], [0, 2]), FIVE, r"documents\[1\] = 2; expected 1"),
    "falling documents": (index_bytes([2, 3], [0, 2, 1, 2]), FIVE, r"documents\[2\] = 1; expected rising"),
    "wild document": (index_bytes([2, 3], [0, 9, 2]), FIVE, r"documents\[1\] = 9; expected rising, at most 2"),
    "truncated data": (index_bytes([3, 2], [0, 1, 2]), FIVE[:-2], r"bin: size = 8 bytes; expected 10 bytes"),
    "odd data": (index_bytes([3, 2], [0, 1, 2]), FIVE[:-1], r"bin: size = 9 bytes"),
    "longer data": (index_bytes([3, 2], [0, 1, 2]), FIVE + b"xx", r"bin: size = 12 bytes; expected 10 bytes"),
    "data without sequences": (index_bytes([], [0]), FIVE, r"bin: size = 10 bytes; expected 0 bytes"),
}


@pytest.mark.parametrize("index, data, message", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(tmp_path, index, data, message):
    with pytest.raises(DataFormatError, match=message) as caught:
        IndexedDataset(put(tmp_path, index, data))
    assert str(tmp_path / "set") in str(caught.value)
    assert caught.value.exit_code == 65


IN_THE_MIDDLE = ["negative length", "gap", "odd", "wild", "falling documents", "wild document"]


@pytest.mark.parametrize("case", IN_THE_MIDDLE)
def test_large_tables_are_checked_when_they_are_used_and_by_verify(tmp_path, monkeypatch, case):
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
    index, content, message = DAMAGED[case]
    data = IndexedDataset(put(tmp_path, index, content))
    with pytest.raises(DataFormatError, match=message):
        data.verify(None)


@pytest.mark.parametrize("pointer", [3, 1 << 62, -8, 12])
def test_a_wrong_pointer_is_found_on_access(tmp_path, monkeypatch, pointer):
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
    index = index_bytes([1, 2, 2], [0, 1, 2, 3], pointers=[0, pointer, 6])
    data = IndexedDataset(put(tmp_path, index, FIVE))
    with pytest.raises(DataFormatError, match=rf"set\.idx: pointers\[1\] = {pointer}"):
        data.document_start(1)


def test_documents_that_run_backwards_are_found_on_access(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
    data = IndexedDataset(put(tmp_path, index_bytes([1, 1, 1, 2], [0, 2, 1, 3, 4]), FIVE))
    with pytest.raises(DataFormatError, match=r"documents\[2\]"):
        data.document_starts_in(0, 5)


def test_one_changed_pointer_of_a_large_index_is_never_a_shifted_border(tmp_path, monkeypatch):
    """Without checksums: every complete read refuses it, and every search is right or refuses."""
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
    lengths = [3, 1, 4, 1, 5, 2]
    pointers = [2 * sum(lengths[:i]) for i in range(6)]
    starts = {offset // 2 for offset in pointers}
    refused = 0
    for which, pointer in itertools.product(range(1, 6), range(0, 34)):
        changed = [*pointers[:which], pointer, *pointers[which + 1 :]]
        index = index_bytes(lengths, range(7), pointers=changed)
        if changed == pointers or 2 * sum(lengths) != changed[-1] + 2 * lengths[-1]:
            continue
        data = IndexedDataset(put(tmp_path, index, bytes(32)))
        with pytest.raises(DataFormatError, match=rf"pointers\[{which}\]"):
            list(data.document_lengths())
        data = IndexedDataset(tmp_path / "set")
        for start, stop in itertools.combinations(range(17), 2):
            try:
                found = data.document_starts_in(start, stop).tolist()
                assert found == sorted(x for x in starts if start < x < stop), (which, pointer, start, stop)
            except DataFormatError:
                refused += 1
        with pytest.raises(DataFormatError, match=r"pointers"):
            [data.document_start(j) for j in range(7)]
    assert refused > 1000


@pytest.mark.parametrize("vocab_size, bad", [(12, None), (11, 4), (8, 1)])
def test_an_id_beyond_the_vocabulary_is_named_with_its_document(tmp_path, vocab_size, bad):
    data = copy.copy(IndexedDataset(some(tmp_path), vocab_size))  # as in a worker
    assert data.tokens(0, 1).tolist() == [7]
    if bad is None:
        assert data.tokens(0, 5).size == 5
        return
    place = "token 1 of document 0" if bad == 1 else "token 1 of document 2"
    with pytest.raises(DataFormatError, match=rf"set\.bin: tokens\[{bad}\] = .*0 \.\. {vocab_size - 1}, .*{place}\)"):
        data.tokens(0, 5)


@pytest.mark.parametrize("name", ["set.idx", "set.bin"])
def test_a_missing_file_is_named_and_how_to_make_it(tmp_path, name):
    prefix = some(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}; .*triaxis preprocess"):
        IndexedDataset(prefix)


def test_a_prefix_given_with_its_ending(tmp_path):
    with pytest.raises(DataError, match=r"without \.bin"):
        IndexedDataset(f"{some(tmp_path)}.bin")


def test_a_directory_is_not_a_dataset(tmp_path):
    (tmp_path / "set.idx").mkdir()
    with pytest.raises(DataError, match=r"set\.idx"):
        IndexedDataset(tmp_path / "set")


def test_data_that_shrink_while_in_use_give_a_message(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_documents(np.zeros(40_000, np.int64), [20_000] * 2)
    data = IndexedDataset(tmp_path / "set")
    os.truncate(tmp_path / "set.bin", 100)
    for start in (0, 39_000):
        with pytest.raises(DataFormatError, match=r"set\.bin: size = 100 bytes; expected 80000 .*shrank"):
            data.tokens(start, 1000)
    with pytest.raises(DataFormatError, match=r"set\.bin: size"):
        data.verify(10)


def test_an_index_that_shrinks_while_in_use_gives_a_message(tmp_path):
    data = IndexedDataset(some(tmp_path))
    os.truncate(tmp_path / "set.idx", 40)
    with pytest.raises(DataFormatError, match=r"set\.idx: size = 40 bytes; expected 102 .*shrank"):
        data.document_start(1)


def test_verify_finds_the_first_id_outside_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_format, "CHUNK", 2)
    reports = []
    data = IndexedDataset(some(tmp_path))
    data.verify(12, lambda *report: reports.append(report))
    assert reports[-1] == (data.num_bytes, data.num_bytes)
    assert reports == sorted(reports)
    with pytest.raises(DataFormatError, match=r"set\.bin: tokens\[3\] = 10; expected 0 \.\. 9"):
        data.verify(10)


def test_verify_finds_negative_ids_even_without_a_vocabulary(tmp_path):
    prefix = put(tmp_path, index_bytes([3], [0, 1], code=4, itemsize=4), struct.pack("<3i", 5, -2, 5))
    with pytest.raises(DataFormatError, match=r"tokens\[1\] = -2; expected 0 or more"):
        IndexedDataset(prefix).verify(None)


def mutated(draw: random.Random, content: bytes) -> bytes:
    """A few bytes changed, or the end cut or grown."""
    result = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        kind = draw.randrange(6)
        if kind == 0:
            del result[draw.randrange(len(result) + 1) :]
        elif kind == 1:
            result += draw.randbytes(draw.choice([1, 4, 8, 24]))
        elif result:
            at = draw.randrange(min(len(result), draw.choice([34, 1 << 30])))
            piece = draw.choice([b"\xff", b"\x00", b"\x80", b"\xff" * 8, b"\x7f", draw.randbytes(4)])
            result[at : at + len(piece)] = piece
    return bytes(result)


def outcome(prefix: Path) -> tuple[bool, int]:
    """Whether all reads of a dataset are refused with a format error, and the peak of memory they allocate."""
    tracemalloc.start()
    try:
        data = IndexedDataset(prefix)
        data.tokens(0, data.num_tokens)
        starts = data.document_starts_in(0, data.num_tokens)
        assert ((starts > 0) & (starts < data.num_tokens)).all()
        assert sum(int(chunk.sum()) for chunk in data.document_lengths()) == data.num_tokens
        data.verify(1 << 16)
        return False, tracemalloc.get_traced_memory()[1]
    except DataFormatError:
        return True, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("checked_at_opening", [0, 1 << 20])
def test_mutated_files_give_data_or_a_format_error(tmp_path, monkeypatch, checked_at_opening):
    """2 x 2,500 mutations: no other exception, no read outside the files, no large allocation."""
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", checked_at_opening)
    draw = random.Random(checked_at_opening)
    lengths = [3, 0, 5, 1, 7, 2]
    index, content = index_bytes(lengths, [0, 2, 2, 3, 6]), bytes(range(36))
    refused = 0
    for _ in range(2500):
        broken = draw.random() < 0.9
        prefix = put(tmp_path, mutated(draw, index) if broken else index, content if broken else mutated(draw, content))
        tries = (outcome(prefix) for _ in range(3))  # memory of other threads is counted too, but not three times
        was_refused = next((was_refused for was_refused, peak in tries if peak < 1 << 20), None)
        assert was_refused is not None, "reading allocates more than 1 MiB"
        refused += was_refused
    assert refused > 1000


def masked(prefix: Path) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, np.uint16, masked=True) as writer:
        writer.add_document([5, 6, 7], [0, 1, 1])
        writer.add_documents([8, 9], [1, 1], np.array([True, False]))
    return IndexedDataset(prefix)


def test_a_mask_says_which_tokens_are_targets(tmp_path):
    data = masked(tmp_path / "chat")
    assert data.has_mask and data.mask(0, 5).tolist() == [0, 1, 1, 1, 0] and data.mask(2, 1).tolist() == [1]
    assert (tmp_path / "chat.mask.bin").read_bytes() == b"\0\1\1\1\0"
    data.verify(10)
    with pytest.raises(IndexError):
        data.mask(4, 2)


def test_a_mask_that_does_not_belong_to_the_tokens_is_refused(tmp_path):
    masked(tmp_path / "chat")
    path = tmp_path / "chat.mask.bin"
    path.write_bytes(b"\0\1\2\1\0")
    data = IndexedDataset(tmp_path / "chat")
    for look in (lambda: data.mask(0, 5), lambda: data.verify(10)):
        with pytest.raises(DataFormatError, match=r"chat\.mask\.bin: mask\[2\] = 2; expected 0 or 1"):
            look()
    path.write_bytes(b"\0\1\1\1")
    with pytest.raises(DataFormatError, match=r"chat\.mask\.bin: size = 4 bytes; expected 5"):
        IndexedDataset(tmp_path / "chat")
    with IndexedDatasetWriter(tmp_path / "plain", np.uint16, masked=True) as writer, pytest.raises(ValueError):
        writer.add_document([1, 2])
    with IndexedDatasetWriter(tmp_path / "chat", np.uint16) as writer:  # an old mask must not stay beside new tokens
        writer.add_document([1, 2, 3, 4, 5])
    assert not IndexedDataset(tmp_path / "chat").has_mask

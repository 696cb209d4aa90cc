"""Writing datasets: the exact bytes, all of the files or none."""

import errno
import os
import struct

import numpy as np
import pytest

from engine.data.storage import format as storage_format
from engine.data.storage.format import token_dtype
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import DataError, StorageError
from tests.data.storage.raw import INFO, index_bytes, some


def test_the_writer_writes_the_bytes_that_the_format_prescribes(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", token_dtype(300)) as writer:
        writer.add_document([7, 8, 9])
        writer.add_documents(np.array([10, 11]), [0, 2])
    assert (tmp_path / "set.bin").read_bytes() == struct.pack("<5H", 7, 8, 9, 10, 11)
    assert (tmp_path / "set.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
        b"\x08"  # uint16
        b"\x03\x00\x00\x00\x00\x00\x00\x00"  # sequences
        b"\x04\x00\x00\x00\x00\x00\x00\x00"  # document indices
        b"\x03\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00"  # lengths 3, 0, 2
        + struct.pack("<3q", 0, 6, 6)  # pointers, in bytes
        + struct.pack("<4q", 0, 1, 2, 3)  # document indices
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.checksums", "set.idx"]


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32
    with IndexedDatasetWriter(tmp_path / "set", token_dtype(100_000)) as writer:
        writer.add_document([99_999, 1])
    assert (tmp_path / "set.bin").read_bytes() == struct.pack("<2i", 99_999, 1)
    assert (tmp_path / "set.idx").read_bytes() == index_bytes([2], [0, 1], code=4, itemsize=4)


def test_pointers_of_many_documents_continue_from_chunk_to_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_format, "CHUNK", 3)
    lengths = [4, 0, 1, 2, 2, 5, 0, 3]
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_documents(np.arange(17), lengths)
    assert (tmp_path / "set.idx").read_bytes() == index_bytes(lengths, range(9))
    IndexedDataset(tmp_path / "set").verify(17)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "set", np.uint16, INFO) as writer:
        writer.add_document([1, 2, 3])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_is_reported_and_leaves_the_old_dataset(tmp_path, monkeypatch, failing):
    before = some(tmp_path).with_suffix(".idx").read_bytes()
    calls = iter(range(1, 10))

    def fsync(descriptor):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(StorageError, match=r"set.*No space left"),
        IndexedDatasetWriter(tmp_path / "set", np.uint16, INFO) as writer,
    ):
        writer.add_document([1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]
    assert (tmp_path / "set.idx").read_bytes() == before


def test_the_index_appears_last_and_is_never_beside_foreign_data(tmp_path, monkeypatch):
    some(tmp_path)
    (tmp_path / "set.json").write_text("stale")
    appeared = []
    replace = os.replace

    def recording(source, target):
        if target.suffix != ".idx":
            assert not (tmp_path / "set.idx").exists()
        appeared.append(target.suffix)
        replace(source, target)

    monkeypatch.setattr(os, "replace", recording)
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, INFO) as writer:
        writer.add_document([5])
    assert appeared == [".bin", ".json", ".checksums", ".idx"]
    assert IndexedDataset(tmp_path / "set").info is not None
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([5])
    assert IndexedDataset(tmp_path / "set").info is None  # the old description went with the old data


@pytest.mark.parametrize("ids", [[65_536], [-1], [3, 70_000, 4]])
def test_ids_that_the_type_cannot_hold_are_refused(tmp_path, ids):
    with pytest.raises(DataError, match=r"does not fit uint16"), IndexedDatasetWriter(tmp_path / "set", "u2") as writer:
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_float_types_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        IndexedDatasetWriter(tmp_path / "set", np.float32)

"""Block checksums: what they find that the format itself does not."""

import os
import struct

import numpy as np
import pytest
import xxhash

from engine.data.storage import reader
from engine.data.storage.checksums import SEALED_BLOCK, BlockHasher, read_checksums
from engine.data.storage.format import dataset_file
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter, seal
from engine.errors import DataFormatError
from tests.data.storage.mutations import campaign, write_dataset
from tests.data.storage.raw import INFO, some

LARGE = 2 * SEALED_BLOCK // 2 + 1000  # tokens of two bytes in three blocks


@pytest.fixture
def large(tmp_path):
    """A dataset of three blocks, in documents of 1000 tokens."""
    ids = np.arange(LARGE) % 300
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, INFO) as writer:
        for start in range(0, LARGE, 100_000):
            part = ids[start : start + 100_000]
            writer.add_documents(part, np.diff([*range(0, len(part), 1000), len(part)]))
    return tmp_path / "set"


def change(prefix, kind, position, content=b"\x01\x00"):
    with dataset_file(prefix, kind).open("r+b") as file:
        file.seek(position)
        assert file.read(len(content)) != content
        file.seek(position)
        file.write(content)


def test_the_file_is_what_its_description_says(large):
    sizes = [os.path.getsize(dataset_file(large, kind)) for kind in ("idx", "bin", "json")]
    content = dataset_file(large, "bin").read_bytes()
    blocks = [content[i : i + SEALED_BLOCK] for i in range(0, len(content), SEALED_BLOCK)]
    parts = [dataset_file(large, "idx").read_bytes(), *blocks, dataset_file(large, "json").read_bytes()]
    header = struct.pack("<8s5Q", b"TRXSUMS\0", 1, sizes[0], sizes[1], 2**64 - 1, sizes[2])
    body = header + b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(part)) for part in parts)
    expected = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    assert dataset_file(large, "checksums").read_bytes() == expected
    assert IndexedDataset(large).verify(300).encode() == expected


@pytest.mark.parametrize("sizes", [[], [0, 5], [SEALED_BLOCK], [SEALED_BLOCK - 1, 2], [3, 2 * SEALED_BLOCK, 1]])
def test_a_file_is_hashed_as_it_is_written(sizes):
    content, hasher = os.urandom(sum(sizes)), BlockHasher()
    start = 0
    for size in sizes:
        hasher.update(content[start : start + size])
        start += size
    found = hasher.finish()
    blocks = [content[i : i + SEALED_BLOCK] for i in range(0, len(content), SEALED_BLOCK)]
    assert (found.size, found.hashes.tolist()) == (len(content), [xxhash.xxh3_64_intdigest(block) for block in blocks])


def test_verify_finds_a_valid_token_that_has_changed(large):
    change(large, "bin", SEALED_BLOCK + 10, b"\x07\x00")
    with pytest.raises(DataFormatError, match=rf"set\.bin: xxh3-64 of bytes {SEALED_BLOCK} \.\. .*--seal"):
        IndexedDataset(large).verify(300)
    assert IndexedDataset(large).tokens(0, 5).tolist() == [0, 1, 2, 3, 4]  # opening does not read everything


def test_a_span_is_verified_with_the_borders_of_its_documents(large):
    place = SEALED_BLOCK // 2 + 7  # in the second of three blocks
    change(large, "bin", SEALED_BLOCK + 10, b"\x07\x00")
    data = IndexedDataset(large)
    data.verify_spans([(0, 1000), (LARGE - 5, 5)])
    for spans in ([(place, 1)], [(0, 1), (SEALED_BLOCK // 2 - 1, 2)]):
        with pytest.raises(DataFormatError, match=r"set\.bin: xxh3-64"):
            data.verify_spans(spans)
    change(large, "bin", SEALED_BLOCK + 10, struct.pack("<H", (SEALED_BLOCK // 2 + 5) % 300))
    data.verify_spans([(place, 1)])
    change(large, "idx", 34, b"\x06")
    with pytest.raises(DataFormatError, match=r"set\.idx: xxh3-64"):
        data.verify_spans([(place, 1)])


def test_a_foreign_dataset_is_sealed_and_a_meant_change_sealed_again(tmp_path):
    prefix = some(tmp_path)
    assert IndexedDataset(prefix).checksums is None and read_checksums(prefix) is None
    seal(prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.checksums", "set.idx"]
    before = IndexedDataset(prefix)
    before.verify(12)
    change(prefix, "bin", 0, b"\x03")
    with pytest.raises(DataFormatError, match=r"set\.bin: xxh3-64 of bytes 0 \.\. 9 = "):
        IndexedDataset(prefix).verify(12)
    seal(prefix, 12)
    after = IndexedDataset(prefix)
    after.verify(12)
    assert before.identity()[1:] != after.identity()[1:]
    with pytest.raises(DataFormatError, match=r"tokens\[1\] = 8"):
        seal(prefix, 8)


@pytest.mark.parametrize("kind", ["bin", "json", "mask.bin"])
def test_files_that_come_or_go_are_found_at_opening(tmp_path, kind):
    write_dataset(tmp_path / "set", 10)
    path = dataset_file(tmp_path / "set", kind)
    content = path.read_bytes()
    if kind != "bin":
        path.unlink()
        with pytest.raises(DataFormatError, match=rf"set\.{kind}: size = missing; expected {len(content)} bytes, as"):
            data = IndexedDataset(tmp_path / "set")
            assert kind == "json"  # reading works without it
            data.verify_spans([(0, 5)])
            data.verify(300)
    path.write_bytes(content + b"\0\0")
    with pytest.raises(DataFormatError, match=rf"set\.{kind}: size = {len(content) + 2} bytes"):
        IndexedDataset(tmp_path / "set")


def test_a_mask_beside_a_dataset_without_one(large):
    dataset_file(large, "mask.bin").write_bytes(bytes(LARGE))
    with pytest.raises(DataFormatError, match=rf"set\.mask\.bin: size = {LARGE} bytes; expected no such file"):
        IndexedDataset(large)


@pytest.mark.parametrize("checked_at_opening", [0, 1 << 20])
def test_no_change_is_silent(tmp_path, monkeypatch, checked_at_opening):
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", checked_at_opening)
    write_dataset(tmp_path / "set", 60)
    kinds = ("idx", "bin", "mask.bin", "json", "checksums")
    assert campaign(tmp_path / "set", 60, kinds) == {(kind, "refused"): 60 for kind in kinds}

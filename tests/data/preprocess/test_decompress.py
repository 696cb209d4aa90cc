"""Compressed files: truncated, damaged, concatenated."""

import os

import orjson
import pytest

from engine.data.preprocess import decompress
from engine.data.preprocess.sources import COMPRESSIONS
from tests.data.preprocess.examples import LINES, TEXTS, compress, read_documents


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_truncated_compression_keeps_what_came_before(tmp_path, suffix, block_bytes):
    content = b"".join(orjson.dumps({"text": os.urandom(200).hex()}) + b"\n" for _ in range(200))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (1, 5, 10_000):
        path.write_bytes(compress(content, suffix)[:-cut])
        texts, ((line, reason),) = read_documents(path, block_bytes=block_bytes)
        assert reason == "truncated compressed file, rest skipped"
        assert line == len(texts) + 1
        assert all(f'"{text}"'.encode() in content for text in texts)
    path.write_bytes(b"")
    assert read_documents(path) == ([], [(1, "truncated compressed file, rest skipped")])


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_damaged_compression(tmp_path, suffix):
    whole = bytearray(compress(b"".join(os.urandom(50).hex().encode() + b"\n" for _ in range(2000)), suffix))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"not compressed at all" * 10)
    assert "damaged" in read_documents(path)[1][0][1]
    whole[len(whole) // 2 : len(whole) // 2 + 50] = bytes(50)
    path.write_bytes(whole)
    texts, rejects = read_documents(path)
    assert texts == [] and len(rejects) == 1
    path.write_bytes(compress(b"good", suffix) + b"trailing garbage")
    assert "damaged" in read_documents(path)[1][0][1]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files_one_after_another(tmp_path, suffix):
    """As `cat a.gz b.gz` and parallel compressors make them; some pad with zeros."""
    path = tmp_path / f"a.jsonl{suffix}"
    one = compress(LINES, suffix)
    for glue in (b"", b"\0" * decompress.COMPRESSED_BYTES):
        path.write_bytes(one + glue + one + b"\0" * 512)
        assert read_documents(path) == (TEXTS * 2, [])
    padding = decompress.COMPRESSED_BYTES - len(one)
    path.write_bytes(one + b"\0" * padding + one)  # the second starts where a reading ends
    assert read_documents(path) == (TEXTS * 2, [])

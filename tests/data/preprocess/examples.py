"""Documents as files, and what is read of them."""

import bz2
import gzip
import lzma

import orjson
import zstandard

from engine.data.preprocess.blocks import BLOCK_BYTES, read_blocks
from engine.data.preprocess.documents import parse_block
from engine.data.preprocess.sources import find_sources

TEXTS = ["one", "two\nlines", "", "naïve 中文", "nul \x00 inside", "x" * 5000, " "]
LINES = b"".join(orjson.dumps({"id": i, "text": text}) + b"\n" for i, text in enumerate(TEXTS))


def read_documents(path, keys=("text",), block_bytes=BLOCK_BYTES):
    """Texts, and rejects as (line, reason)."""
    read = list(read_blocks(find_sources([str(path)]), block_bytes))
    parsed = [parse_block(block, keys) for block in read]
    rejects = [reject for _, found in parsed for reject in found]
    assert all(reject.file == str(path) for reject in rejects)
    return [text for found, _ in parsed for (text, *_) in found], [(r.line, r.reason) for r in rejects]


def compress(content, suffix):
    with_checksum = zstandard.ZstdCompressor(write_checksum=True).compress
    known = {"": bytes, ".gz": gzip.compress, ".zst": with_checksum, ".bz2": bz2.compress, ".xz": lzma.compress}
    return known[suffix](content)

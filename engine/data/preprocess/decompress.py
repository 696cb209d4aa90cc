"""Reads plain and compressed files in chunks.

Alternative considered: `gzip.open` and the like, which lose the content read before damage; the one for zstd accepts a
truncated file as complete.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import zstandard

COMPRESSED_BYTES = 1 << 13  # read at a time, so that a decompression bomb expands in small pieces
LARGEST_WINDOW = 1 << 31  # zstd --long=31, which large published corpora use
LARGEST_DICTIONARY = 1 << 30  # bytes of memory for xz, of which `xz -9` needs a fifteenth


class Unreadable(Exception):
    """The rest of a file cannot be read."""


class _Inflater(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def read_chunks(path: str, file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """Yield the content of a file, decompressed according to its suffix; plain content in chunks of `chunk_bytes`.

    Raises:
        Unreadable: damaged or truncated; the content before the damage has been yielded.
    """
    compression = Path(path).suffix
    if compression == ".gz":
        return _inflated(file, lambda: zlib.decompressobj(wbits=31))
    if compression == ".zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        return _inflated(file, decompressor.decompressobj)
    if compression == ".bz2":
        return _inflated(file, bz2.BZ2Decompressor)
    if compression == ".xz":
        return _inflated(file, lambda: lzma.LZMADecompressor(memlimit=LARGEST_DICTIONARY))
    return iter(lambda: file.read(chunk_bytes), b"")


def _inflated(file: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of a compressed file, which may be several concatenated files."""
    inflater: _Inflater = make()
    while data := file.read(COMPRESSED_BYTES):
        while data:
            if inflater.eof:
                data = data.lstrip(b"\0")  # some tools pad with zeros
                if not data:
                    break
                inflater = make()
            try:
                content = inflater.decompress(data)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:  # OSError: of bz2
                raise Unreadable(f"damaged compressed file, rest skipped: {error}") from None
            if content:
                yield content
            data = inflater.unused_data if inflater.eof else b""
    if not inflater.eof:
        raise Unreadable("truncated compressed file, rest skipped")

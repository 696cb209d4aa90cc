"""Splits files into blocks of whole lines; runs in the parent process.

It does little work per byte; parsing, the slow part, runs in the workers. Damage in a file does not stop reading: it
becomes a block with a `problem`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import orjson

from engine.data.preprocess import parquet
from engine.data.preprocess.decompress import Unreadable, read_chunks
from engine.data.preprocess.json_lines import parse_json
from engine.data.preprocess.rejects import Reject
from engine.data.preprocess.sources import Source
from engine.errors import StorageError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30  # a longer line or text file is rejected
BOM = b"\xef\xbb\xbf"
QUOTED = 200  # bytes kept of a rejected line


@dataclass(frozen=True)
class LineBlock:
    """Consecutive lines of a file, or a whole text file. Elements of a JSON array and rows of Parquet count as lines.

    Attributes:
        first_line: number of the first line, from 1.
        position: stored bytes of all files up to the end of this block.
        problem: the reason why the rest of the file is unreadable; such a block has no data.
    """

    source: Source
    first_line: int
    data: bytes
    position: int
    problem: str | None = None

    def numbered_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and content of each line that is not blank; a text file is one line."""
        data = self.data.removeprefix(BOM) if self.first_line == 1 else self.data
        lines = [data] if self.source.kind == "text" else data.split(b"\n")
        for number, line in enumerate(lines, self.first_line):
            if line and not line.isspace():
                yield number, line

    def reject(self, number: int, reason: str, line: bytes = b"") -> Reject:
        return Reject(self.source.path, number, reason, line[:QUOTED].decode(errors="replace"))


def read_blocks(sources: Sequence[Source], block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Yield all lines of all files in order. Memory: a block, the longest line or the largest JSON array.

    Raises:
        StorageError: a file cannot be read.
    """
    before = 0
    for source in sources:
        for block in _file_blocks(source, block_bytes):
            yield replace(block, position=before + block.position)
        before += source.num_bytes


def _file_blocks(source: Source, block_bytes: int) -> Iterator[LineBlock]:
    """`read_blocks` for one file, with positions relative to it."""
    line = 1
    parts = _parquet_parts if source.kind == "parquet" else _file_parts
    try:
        for data, lines, position in parts(source, block_bytes):
            yield LineBlock(source, line, data, position)
            line += lines
    except Unreadable as error:
        yield LineBlock(source, line, b"", source.num_bytes, problem=str(error))
    except OSError as error:
        raise StorageError(f"cannot read {source.path}: {error.strerror}") from error


def _file_parts(source: Source, block_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield parts of whole lines, with the number of lines in each and the position after it."""
    with open(source.path, "rb") as file:
        for data in _whole_lines(source, file, block_bytes):
            yield data, data.count(b"\n"), file.tell() if file.seekable() else 0  # a named pipe has no position


def _parquet_parts(source: Source, block_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    for lines, share in parquet.read_lines(source.path, block_bytes):
        yield b"\n".join(lines), len(lines), int(source.num_bytes * share)


def _whole_lines(source: Source, file: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """Yield blocks of whole lines of about `block_bytes`; a text file as one block."""
    chunks = read_chunks(source.path, file, block_bytes)
    if source.kind == "json":
        first = next(chunks, b"")
        chunks = itertools.chain([first], chunks)
        if first.removeprefix(BOM).lstrip().startswith(b"["):
            return _elements(chunks, block_bytes)
    return _cut(chunks, block_bytes, at_lines=source.kind != "text")


def _elements(chunks: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """Yield the elements of one JSON array as lines. The array is read at once: nothing marks the end of an element."""
    content = b"".join(_limited(chunks))
    try:
        elements = parse_json(content.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error.msg} (line {error.lineno}, column {error.colno}); skipped") from None
    del content
    return _cut(map(_as_line, elements), block_bytes, at_lines=True)


def _as_line(element: object) -> bytes:
    """Serialize an element; one that is nested too deeply for orjson becomes a line that will be rejected."""
    try:
        return orjson.dumps(element, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        return b"%s\n" % orjson.dumps(f"an element of the array: {error}")


def _limited(chunks: Iterable[bytes]) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_DOCUMENT_BYTES:
            raise Unreadable(
                f"one JSON array of more than {MAX_DOCUMENT_BYTES:,} bytes, skipped; convert it to one object per "
                f"line, for instance with jq -c '.[]'"
            )
        yield chunk


def _cut(chunks: Iterable[bytes], block_bytes: int, *, at_lines: bool) -> Iterator[bytes]:
    """Yield blocks of about `block_bytes`, split after a line, or everything as one block."""
    rest: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            cut = chunk.rfind(b"\n") + 1 if at_lines and size + len(chunk) >= block_bytes else 0
            if cut:
                yield b"".join([*rest, chunk[:cut]])
                rest, size = [], 0
            rest.append(chunk[cut:])
            size += len(chunk) - cut
            if size > MAX_DOCUMENT_BYTES:
                raise Unreadable(f"longer than {MAX_DOCUMENT_BYTES:,} bytes; the rest of the file is skipped")
    except Unreadable:
        whole = b"".join(rest)
        if at_lines and b"\n" in whole:
            yield whole[: whole.rfind(b"\n") + 1]
        raise
    if size:
        yield b"".join(rest)

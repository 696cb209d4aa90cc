"""Splits files into blocks of whole lines; runs in the parent process.

It does little work per byte; parsing, the slow part, runs in the workers. Damage in a file does not stop reading: it
becomes a block with a `problem`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from engine.data.preprocess import columnar
from engine.data.preprocess.csv_lines import csv_lines
from engine.data.preprocess.decompress import Unreadable, read_chunks
from engine.data.preprocess.json_array import array_lines
from engine.data.preprocess.rejects import Reject
from engine.data.preprocess.sources import COLUMNAR, STDIN, Source
from engine.errors import StorageError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30  # a longer line or text file is rejected
BOM = b"\xef\xbb\xbf"
QUOTED = 200  # bytes kept of a rejected line


@dataclass(frozen=True)
class LineBlock:
    """Consecutive lines of a file, or a whole text file. Elements of a JSON array and rows of a table count as lines.

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
    """Yield all lines of all files in order. Memory: a block or the longest line.

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
    parts = _column_parts if source.kind in COLUMNAR else _file_parts
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
    with open(0 if source.path == STDIN else source.path, "rb", closefd=source.path != STDIN) as file:
        for data in _whole_lines(source, file, block_bytes):
            yield data, data.count(b"\n"), file.tell() if file.seekable() else 0  # a pipe has no position


def _column_parts(source: Source, block_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    read = columnar.read_parquet if source.kind == "parquet" else columnar.read_arrow
    for lines, share in read(source.path, block_bytes):
        yield b"\n".join(lines), len(lines), int(source.num_bytes * share)


def _whole_lines(source: Source, file: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """Yield blocks of whole lines of about `block_bytes`; a text file as one block."""
    chunks = read_chunks(source.path, file, block_bytes)
    if source.kind == "json":
        first = b""
        while not first.strip() and (chunk := next(chunks, b"")):
            first = (first + chunk).removeprefix(BOM)
        chunks = itertools.chain([first], chunks)
        if first.lstrip().startswith(b"["):
            chunks = array_lines(chunks, MAX_DOCUMENT_BYTES)
    if source.kind == "csv":
        chunks = csv_lines(source.path, chunks, MAX_DOCUMENT_BYTES)
    return _cut(chunks, block_bytes, at_lines=source.kind != "text")


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

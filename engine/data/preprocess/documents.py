"""Documents out of text files: JSON lines and plain text, also compressed; records also from JSON arrays and Parquet.

Two halves, so that the slow one can run in many processes: `read_blocks` cuts files into blocks of whole lines
(bytes, hardly touched), `parse_block` turns a block into texts. Nothing bad in a file stops the reading: it
becomes a `Reject` that names file, line and reason. Rejected: `gzip.open` and its like, which lose what they
had read before the damage, and of which the one for zstd takes a truncated file for a whole one.
"""

import glob
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import orjson
import zstandard

from engine.data.preprocess import parquet
from engine.data.preprocess.records import FORMATS
from engine.errors import ConfigError, StorageError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30  # a longer line or text file is no document but a mistake
COMPRESSED_BYTES = 1 << 13  # read at a time, so that a decompression bomb unfolds in bearable pieces
LARGEST_WINDOW = 1 << 31  # of zstd --long=31, in which large corpora are published
BOM = b"\xef\xbb\xbf"
CONVERSATION_ADVICE = "; for fine-tuning add --task sft to preprocess_data.py"
QUOTED = 200  # characters of a rejected line that are kept

Kind = Literal["lines", "text", "json", "parquet"]  # json: one array of records, or lines
COMPRESSIONS = (".gz", ".zst")
REJECTS_SUFFIX = ".rejects.jsonl"


@dataclass(frozen=True)
class Accepted:
    """Which files are read, by their suffix.

    `in_directories` are those that a directory is searched for: others there may be anything, so they have to be
    named, or matched by a pattern. Never what the preprocessing itself has left there.
    """

    kinds: dict[str, Kind]
    in_directories: tuple[str, ...]


TEXTS = Accepted(
    {".jsonl": "lines", ".json": "lines", ".txt": "text", ".md": "text", ".rst": "text", ".py": "text"},
    in_directories=(".jsonl", ".txt"),
)
RECORDS = Accepted(
    {".jsonl": "lines", ".json": "json", ".parquet": "parquet"}, in_directories=(".jsonl", ".json", ".parquet")
)


@dataclass(frozen=True)
class Source:
    """A file to read. `num_bytes` is its size as stored."""

    path: str
    kind: Kind
    num_bytes: int


@dataclass(frozen=True)
class Block:
    """Consecutive lines of a file, or a whole text file. Elements of an array are lines, as are rows of Parquet.

    Attributes:
        first_line: number of the first line, from 1.
        position: bytes, as stored, of all files up to the end of this block.
        problem: why the file is unreadable from here on; then there are no data.
    """

    source: Source
    first_line: int
    data: bytes
    position: int
    problem: str | None = None


@dataclass(frozen=True)
class Reject:
    """A line that is no document, or a place from which on a file is unreadable."""

    file: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Unreadable(Exception):
    """The rest of a file cannot be read."""


class _Inflater(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def find_sources(inputs: Sequence[str], accepted: Accepted = TEXTS) -> list[Source]:
    """The files that files, directories and glob patterns name, in that order; within one of them sorted.

    Raises:
        ConfigError: something is missing, of an unknown kind, unreadable, or named twice.
    """
    sources = [_source(path, accepted) for name in inputs for path in _paths(name, accepted)]
    seen: set[str] = set()
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            raise ConfigError(f"--input names {source.path} twice; its documents would count double")
        seen.add(real)
    return sources


def read_blocks(sources: Sequence[Source], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All lines of all files in order; memory is a block, or the longest line, or the largest JSON array.

    Raises:
        StorageError: a file vanished or the disk fails.
    """
    before = 0
    for source in sources:
        for block in _file_blocks(source, block_bytes):
            yield replace(block, position=before + block.position)
        before += source.num_bytes


def _file_blocks(source: Source, block_bytes: int) -> Iterator[Block]:
    """`read_blocks` for one file, with positions inside it."""
    line = 1
    pieces = _parquet_pieces if source.kind == "parquet" else _file_pieces
    try:
        for data, lines, position in pieces(source, block_bytes):
            yield Block(source, line, data, position)
            line += lines
    except (Unreadable, parquet.Damaged) as error:
        yield Block(source, line, b"", source.num_bytes, problem=str(error))
    except OSError as error:
        raise StorageError(f"cannot read {source.path}: {error.strerror}") from error


def _file_pieces(source: Source, block_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """Data, the number of lines in them, and the position behind them."""
    with open(source.path, "rb") as file:
        for data in _pieces(source, file, block_bytes):
            yield data, data.count(b"\n"), file.tell() if file.seekable() else 0  # a named pipe does not tell


def _parquet_pieces(source: Source, block_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    for lines, share in parquet.read_lines(source.path, block_bytes):
        yield b"\n".join(lines), len(lines), int(source.num_bytes * share)


def parse_block(block: Block, keys: Sequence[str]) -> tuple[list[tuple[str, ...]], list[Reject]]:
    """The documents of a block, each with one text a key, and what is none. Blank lines are neither."""
    if block.problem is not None:
        return [], [Reject(block.source.path, block.first_line, block.problem, "")]
    parse = _parse_text if block.source.kind == "text" else _parse_line
    documents, rejects = [], []
    for number, line in numbered_lines(block):
        try:
            documents.append(parse(line, keys))
        except ValueError as error:
            rejects.append(reject(block, number, str(error), line))
    return documents, rejects


def numbered_lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """Number and content of the lines of a block that are not blank; a text file is one line."""
    data = block.data.removeprefix(BOM) if block.first_line == 1 else block.data
    lines = [data] if block.source.kind == "text" else data.split(b"\n")
    for number, line in enumerate(lines, block.first_line):
        if line and not line.isspace():
            yield number, line


def reject(block: Block, number: int, reason: str, line: bytes) -> Reject:
    return Reject(block.source.path, number, reason, line[:QUOTED].decode(errors="replace"))


def _parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError, as `_parse_text` does: with the reason for a person."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object")
    for key in keys:
        if key not in record:
            has = ", ".join(map(repr, list(record)[:8])) or "none"
            raise ValueError(f"no key {key!r}; it has {has}{CONVERSATION_ADVICE * _is_conversation(record)}")
        if not isinstance(record[key], str):
            raise ValueError(f"key {key!r} holds a {type(record[key]).__name__}, expected text")
    return tuple(record[key] for key in keys)


def _is_conversation(record: dict[str, Any]) -> bool:
    """Whether it has the keys of one; see `engine.data.preprocess.records`."""
    return any(set(keys) <= record.keys() for name, keys in FORMATS.items() if name not in ("tokens", "text"))


def _parse_text(data: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        return (data.decode(),)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def _paths(name: str, accepted: Accepted) -> list[str]:
    path = Path(name)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if _is_document_file(file, accepted))
        missing = f"no {' or '.join(accepted.in_directories)} files below the directory {name}"
    elif path.exists():
        return [name]
    else:
        found = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        missing = f"no such file or directory: {name}"
    if not found:
        raise ConfigError(f"--input: {missing}")
    return found


def _is_document_file(path: Path, accepted: Accepted) -> bool:
    written = path.name.endswith(REJECTS_SUFFIX) or (path.suffix == ".json" and path.with_suffix(".idx").exists())
    return _plain_suffix(path) in accepted.in_directories and not written and path.is_file()


def _plain_suffix(path: Path) -> str:
    """The suffix before that of a compression."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _source(path: str, accepted: Accepted) -> Source:
    kind = accepted.kinds.get(_plain_suffix(Path(path)))
    if kind is None or (kind == "parquet" and path.endswith(COMPRESSIONS)):
        known = ", ".join(suffix for suffix, kind in accepted.kinds.items() if kind != "parquet")
        parquet_too = ", or .parquet" * ("parquet" in accepted.kinds.values())
        raise ConfigError(
            f"--input: cannot tell what {path} holds; expected {known}, each also with .gz or .zst{parquet_too}"
        )
    if kind == "parquet":
        parquet.require(path)
    if not os.access(path, os.R_OK):
        raise ConfigError(f"--input: no permission to read {path}")
    return Source(path, kind, os.path.getsize(path))


def _pieces(source: Source, file: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """Blocks of whole lines of about `block_bytes`; a text file in one."""
    chunks = _chunks(source, file, block_bytes)
    if source.kind == "json":
        first = next(chunks, b"")
        chunks = itertools.chain([first], chunks)
        if first.removeprefix(BOM).lstrip().startswith(b"["):
            return _elements(chunks, block_bytes)
    return _cut(chunks, block_bytes, at_lines=source.kind != "text")


def _elements(chunks: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """The elements of one JSON array as lines. It is read whole, since nothing in it marks where an element ends."""
    content = b"".join(_limited(chunks))
    try:
        elements = orjson.loads(content.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error.msg} (line {error.lineno}, column {error.colno}); left out") from None
    del content
    return _cut(map(_as_line, elements), block_bytes, at_lines=True)


def _as_line(element: object) -> bytes:
    """One that is nested deeper than is written becomes a line that is rejected."""
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
                f"one JSON array of more than {MAX_DOCUMENT_BYTES:,} bytes, left out; make it one object a line, "
                f"for instance with jq -c '.[]'"
            )
        yield chunk


def _cut(chunks: Iterable[bytes], block_bytes: int, *, at_lines: bool) -> Iterator[bytes]:
    """Blocks of about `block_bytes`, cut behind a line; all in one where that is not wanted."""
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
                raise Unreadable(f"longer than {MAX_DOCUMENT_BYTES:,} bytes; the file is left out from here on")
    except Unreadable:
        whole = b"".join(rest)
        if at_lines and b"\n" in whole:
            yield whole[: whole.rfind(b"\n") + 1]
        raise
    if size:
        yield b"".join(rest)


def _chunks(source: Source, file: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """The content of a file, decompressed."""
    compression = Path(source.path).suffix
    if compression == ".gz":
        return _inflated(file, lambda: zlib.decompressobj(wbits=31))
    if compression == ".zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        return _inflated(file, decompressor.decompressobj)
    return iter(lambda: file.read(block_bytes), b"")


def _inflated(file: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
    """Content of a compressed file, which may be several such files one after another.

    Raises:
        Unreadable: damaged or truncated; what came before has been yielded.
    """
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
            except (zlib.error, zstandard.ZstdError) as error:
                raise Unreadable(f"damaged compressed file, left out from here on: {error}") from None
            if content:
                yield content
            data = inflater.unused_data if inflater.eof else b""
    if not inflater.eof:
        raise Unreadable("truncated compressed file, left out from here on")

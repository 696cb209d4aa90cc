"""Reads CSV and TSV files as JSON lines, one per row, with the fields of the first row as keys.

Values remain text. Alternative considered: pyarrow's reader, which guesses types from the first block and then fails at
a row of another type.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import orjson

from engine.data.preprocess.decompress import Unreadable
from engine.data.preprocess.json_lines import INVALID


def csv_lines(path: str, chunks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield each row after the first as a line: an object, or, for a row of another length, a text, which is rejected.

    Args:
        path: tabs separate the fields if its suffix is .tsv, before that of a compression.
        chunks: the content, UTF-8.
        max_bytes: of a field.

    Raises:
        Unreadable: quotes do not match. The rows before have been yielded.
    """
    delimiter = "\t" if ".tsv" in Path(path).suffixes else ","
    csv.field_size_limit(max_bytes)
    buffer = io.BufferedReader(_ChunkReader(chunks))
    with io.TextIOWrapper(buffer, "utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            for row in rows:
                if row:  # not of a blank line
                    yield _as_line(names, row)
        except csv.Error as error:
            raise Unreadable(f"not CSV after row {rows.line_num:,}: {error}; the rest is skipped") from None


def _as_line(names: list[str], row: list[str]) -> bytes:
    if len(row) != len(names):
        record: object = f"a row of {len(row)} fields; the first row has {len(names)}: {row[0][:50]}"
    else:
        record = dict(zip(names, row, strict=True))
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        return INVALID + b"\n"


class _ChunkReader(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

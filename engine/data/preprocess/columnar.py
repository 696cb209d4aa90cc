"""Reads Parquet and Arrow IPC files as JSON lines, one per row, so that no other code handles columns.

Arrow files are those of `datasets.save_to_disk` (streams) and Feather's second version. Alternative considered: passing
Arrow batches to the workers. Converting rows to lines takes a small part of the time of reading the file; encoding
takes a hundred times as long.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from engine.data.preprocess.decompress import Unreadable
from engine.data.preprocess.json_lines import INVALID
from engine.errors import ConfigError

MAX_ROWS = 1000  # read at a time, regardless of the size in the metadata
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
Lines = Iterator[tuple[list[bytes], float]]


def require(path: str) -> None:
    """Raise ConfigError if the package for reading `path` is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} needs the package pyarrow: pip install 'triaxis[parquet]'") from None


def read_parquet(path: str, batch_bytes: int) -> Lines:
    """Yield rows in order, about `batch_bytes` at a time, and the fraction of all rows read so far.

    Types that JSON lacks (bytes, decimals) become null, which is rejected as text. Uses the memory of one row group.

    Raises:
        Unreadable: damaged; the rows before the damage have been yielded.
    """
    from pyarrow.parquet import ParquetFile

    with _damage("Parquet"), open(path, "rb") as raw, ParquetFile(raw, pre_buffer=False) as file:
        done, total = 0, file.metadata.num_rows
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            rows = max(1, min(MAX_ROWS, batch_bytes * group.num_rows // max(1, group.total_byte_size)))
            for batch in file.iter_batches(rows, row_groups=[i], use_threads=False):
                done += batch.num_rows
                yield _lines(batch), done / total


def read_arrow(path: str, batch_bytes: int) -> Lines:
    """`read_parquet` for an Arrow IPC file or stream. Uses the memory of one record batch."""
    from pyarrow import ipc

    with _damage("Arrow"), open(path, "rb") as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        size = max(1, os.fstat(raw.fileno()).st_size)
        if is_file:
            file = ipc.open_file(raw)
            batches = ((file.get_batch(i), (i + 1) / file.num_record_batches) for i in range(file.num_record_batches))
        else:
            batches = ((batch, raw.tell() / size) for batch in ipc.open_stream(raw))
        for batch, share in batches:
            rows = max(1, min(MAX_ROWS, batch_bytes * batch.num_rows // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, rows):
                yield _lines(batch.slice(start, rows)), share
        raw.seek(max(0, size - len(END_OF_STREAM)))
        if not is_file and raw.read() != END_OF_STREAM:
            raise Unreadable("an Arrow stream without its end mark; it may be truncated")


@contextmanager
def _damage(kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a disk error; damaged pages have no errno
            raise
        raise Unreadable(f"damaged {kind} file, rest skipped: {error}") from None


def _lines(batch: Any) -> list[bytes]:
    try:
        return [orjson.dumps(row, default=lambda value: None) for row in batch.to_pylist()]
    except (UnicodeDecodeError, orjson.JSONEncodeError):
        if batch.num_rows == 1:
            return [INVALID]
        return [line for i in range(batch.num_rows) for line in _lines(batch.slice(i, 1))]

"""Parquet files as JSON lines, one a row.

The parent cuts row groups into batches and passes them on as they are in memory (Arrow's stream format); a worker
makes lines of them, after which nothing else needs to know where they came from. Rejected: making the lines in the
parent, which would keep the workers waiting.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from engine.errors import ConfigError

INVALID = b"\xff"  # stands for a row that is no text: not valid UTF-8, and rejected for that as any such line
MAX_ROWS = 1000  # of a batch, whatever the metadata say of their size


class Damaged(Exception):
    """The rest of a file cannot be read."""


def require(path: str) -> None:
    """Raises ConfigError where the package for reading `path` is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} needs the package pyarrow: pip install 'triaxis[parquet]'") from None


def read_batches(path: str, batch_bytes: int) -> Iterator[tuple[bytes, int, float]]:
    """Rows in order, about `batch_bytes` at a time: for `json_lines`, their number, and the share of the file so far.

    Memory is a row group at most.

    Raises:
        Damaged: with the reason; what came before has been yielded.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open(path, "rb") as raw, ParquetFile(raw, pre_buffer=False) as file:
            done, total = 0, file.metadata.num_rows
            for i in range(file.num_row_groups):
                group = file.metadata.row_group(i)
                rows = max(1, min(MAX_ROWS, batch_bytes * group.num_rows // max(1, group.total_byte_size)))
                for batch in file.iter_batches(rows, row_groups=[i], use_threads=False):
                    done += batch.num_rows
                    yield _stream(batch), batch.num_rows, done / total
    except pyarrow.ArrowException as error:
        raise Damaged(f"damaged Parquet file, left out from here on: {error}") from None
    except OSError as error:  # also what pyarrow raises for damaged pages
        if error.errno is not None:
            raise
        raise Damaged(f"damaged Parquet file, left out from here on: {error}") from None


def json_lines(data: bytes) -> list[bytes]:
    """The rows of a batch. What JSON has no word for (bytes, decimals) becomes null, which no text may be."""
    import pyarrow

    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    with pyarrow.ipc.open_stream(data, options=options) as reader:
        batches = list(reader)
    return [line for batch in batches for line in _lines(batch)]


def _lines(batch: Any) -> list[bytes]:
    try:
        return [orjson.dumps(row, default=lambda value: None) for row in batch.to_pylist()]
    except (UnicodeDecodeError, orjson.JSONEncodeError):
        if batch.num_rows == 1:
            return [INVALID]
        return [line for i in range(batch.num_rows) for line in _lines(batch.slice(i, 1))]


def _stream(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content

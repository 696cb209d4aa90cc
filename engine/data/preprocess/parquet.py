"""Parquet files as JSON lines, one a row, after which nothing else needs to know where they came from.

Rejected: passing Arrow's own batches on to the workers. Making the lines takes a small part of what reading the file
takes, and a worker a hundred times as long to encode them.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from engine.errors import ConfigError

INVALID = b"\xff"  # stands for a row that is no text: not valid UTF-8, and rejected for that as any such line
MAX_ROWS = 1000  # read at a time, whatever the metadata say of their size


class Damaged(Exception):
    """The rest of a file cannot be read."""


def require(path: str) -> None:
    """Raises ConfigError where the package for reading `path` is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} needs the package pyarrow: pip install 'triaxis[parquet]'") from None


def read_lines(path: str, batch_bytes: int) -> Iterator[tuple[list[bytes], float]]:
    """Rows in order, about `batch_bytes` at a time, and the share of all rows that has been read with them.

    What JSON has no word for (bytes, decimals) becomes null, which no text may be. Memory is a row group at most.

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
                    yield _lines(batch), done / total
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk; pyarrow's own for damaged pages have none
            raise
        raise Damaged(f"damaged Parquet file, left out from here on: {error}") from None


def _lines(batch: Any) -> list[bytes]:
    try:
        return [orjson.dumps(row, default=lambda value: None) for row in batch.to_pylist()]
    except (UnicodeDecodeError, orjson.JSONEncodeError):
        if batch.num_rows == 1:
            return [INVALID]
        return [line for i in range(batch.num_rows) for line in _lines(batch.slice(i, 1))]

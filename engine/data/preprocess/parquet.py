"""Reads Parquet files as JSON lines, one per row, so that no other code handles Parquet.

Alternative considered: passing Arrow batches to the workers. Converting rows to lines takes a small part of the time of
reading the file; encoding takes a hundred times as long.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from engine.data.preprocess.decompress import Unreadable
from engine.errors import ConfigError

INVALID = b"\xff"  # replaces a row that is not text; rejected because it is not valid UTF-8
MAX_ROWS = 1000  # read at a time, regardless of the size in the metadata


def require(path: str) -> None:
    """Raise ConfigError if the package for reading `path` is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} needs the package pyarrow: pip install 'triaxis[parquet]'") from None


def read_lines(path: str, batch_bytes: int) -> Iterator[tuple[list[bytes], float]]:
    """Yield rows in order, about `batch_bytes` at a time, and the fraction of all rows read so far.

    Types that JSON lacks (bytes, decimals) become null, which is rejected as text. Uses the memory of one row group.

    Raises:
        Unreadable: damaged; the rows before the damage have been yielded.
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
        if isinstance(error, OSError) and error.errno is not None:  # a disk error; damaged pages have no errno
            raise
        raise Unreadable(f"damaged Parquet file, rest skipped: {error}") from None


def _lines(batch: Any) -> list[bytes]:
    try:
        return [orjson.dumps(row, default=lambda value: None) for row in batch.to_pylist()]
    except (UnicodeDecodeError, orjson.JSONEncodeError):
        if batch.num_rows == 1:
            return [INVALID]
        return [line for i in range(batch.num_rows) for line in _lines(batch.slice(i, 1))]

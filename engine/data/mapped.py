"""A file mapped into memory and not believed; its errors name it.

A map is what makes a dataset of terabytes cost nothing to open. Its one danger is that a file that shrinks
under it kills the process with a bus error, so sizes are asked before each read. Rejected: `pread` alone,
which has no such danger but leaves the binary searches in the index with a system call a step.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import DataError, DataFormatError

Array = npt.NDArray[Any]


class MappedFile:
    """A read-only map of a whole file, and the checks that name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0
                self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DataError(_missing(path)) from None
        self.size = 0 if self._map is None else len(self._map)

    def array(self, dtype: npt.DTypeLike, offset: int, count: int) -> Array:
        """A view of `count` items at byte `offset`."""
        return np.frombuffer(self._map or b"", dtype, count, offset)

    def read(self, dtype: np.dtype[Any], start: int, count: int) -> Array:
        """Items `[start, start + count)` past the map, so that a scan does not fill this process's memory."""
        items = np.fromfile(self.path, dtype, count, offset=start * dtype.itemsize)
        self.expect(
            items.size == count, "size", f"{items.size} of {count} items from {start} on", "all of them"
        )
        return items

    def check_size(self) -> None:
        """Reading a map past the end of its file kills the process, so every read asks first."""
        if self._map is not None and self._map.size() < self.size:
            seen, expected = (
                f"{self._map.size()} bytes",
                f"{self.size} as when it was opened; it shrank meanwhile",
            )
            raise format_error(self.path, "size", seen, expected)

    def expect(self, holds: bool | np.bool_, field: str, value: object, expected: str) -> None:
        if not holds:
            raise format_error(self.path, field, value, expected)

    def expect_all(
        self, holds: npt.NDArray[np.bool_], field: str, start: int, values: Array, expected: str
    ) -> None:
        """As `expect` for `values[i]`, which is entry `start + i` of the field."""
        if not holds.all():
            i = int(holds.argmin())
            raise format_error(self.path, f"{field}[{start + i}]", int(values[i]), expected)


def format_error(path: Path, field: str, value: object, expected: str) -> DataFormatError:
    """Which file, which field, what it says, what was expected."""
    return DataFormatError(f"{path}: {field} = {value}; expected {expected}")


def _missing(path: Path) -> str:
    hint = ""
    if path.with_suffix("").suffix in (".bin", ".idx"):
        hint = f"; give the prefix without {path.with_suffix('').suffix}"
    return (
        f"no dataset file at {path}{hint}; a dataset is a PREFIX.bin and a PREFIX.idx, "
        "which tools/preprocess_data.py makes from text"
    )

"""Reads untrusted binary files by position; errors name the file, the field, its value and the expected value.

Tokens are read from a memory map without read-ahead (`MADV_RANDOM`): samples are at random offsets, and with the
kernel's read-ahead, reading 4097 tokens of a cold 2 TB file took 5,500 µs instead of 21. Each of these reads first
checks the file size, because accessing the map of a file that has shrunk kills the process with a bus error. Index
entries and the long sequential reads of complete checks use `pread`: a binary search on a map touches a page per step,
and the process would grow by the whole index.
"""

import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import DataError, DataFormatError

CHUNK = 1 << 20  # table entries in memory at a time
LARGEST_MAPPED_READ = 1 << 20  # bytes

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


class CheckedFile:
    """A file opened for reading by position.

    Args:
        mapped: use a memory map for short reads.

    Raises:
        DataError: the file does not exist, or is not a regular file.
    """

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_missing(path)) from None
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(_missing(path))
        self.size = status.st_size
        self._map = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ) if mapped and self.size else None
        if self._map is not None and hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    def read(self, position: int, count: int) -> bytes:
        """Read exactly `count` bytes at `position`; the caller has checked the range against `size`.

        Raises:
            DataFormatError: the file has shrunk.
        """
        if self._map is not None and count <= LARGEST_MAPPED_READ:
            self.check_size()
            return self._map[position : position + count]
        data = os.pread(self._descriptor, count, position)
        while len(data) < count:
            more = os.pread(self._descriptor, count - len(data), position + len(data))
            if not more:
                self.check_size()
                raise format_error(self.path, "size", f"{position + len(data)} bytes", f"{self.size}")
            data += more
        return data

    def check_size(self) -> None:
        """Raise DataFormatError if the file has shrunk since it was opened."""
        size = os.fstat(self._descriptor).st_size
        if size < self.size:
            expected = f"{self.size} as when it was opened; it shrank while in use"
            raise format_error(self.path, "size", f"{size} bytes", expected)

    def expect(self, holds: bool | np.bool_, field: str, value: object, expected: str) -> None:
        if not holds:
            raise format_error(self.path, field, value, expected)


class Table:
    """A named array of integers inside a file, read on demand."""

    def __init__(self, file: CheckedFile, name: str, dtype: npt.DTypeLike, offset: int, count: int) -> None:
        self.file, self.name, self.dtype, self.offset = file, name, np.dtype(dtype), offset
        self._count, self._itemsize, self._signed = count, self.dtype.itemsize, self.dtype.kind == "i"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        data = self.file.read(self.offset + i * self._itemsize, self._itemsize)
        return int.from_bytes(data, "little", signed=self._signed)

    def span(self, start: int, stop: int) -> Array:
        """Read the entries `[start, stop)`; read-only, in the table's dtype."""
        data = self.file.read(self.offset + start * self._itemsize, (stop - start) * self._itemsize)
        return np.frombuffer(data, self.dtype)

    def byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return the bytes `[begin, end)` of the file in which the entries `[start, stop)` are."""
        return self.offset + start * self._itemsize, self.offset + stop * self._itemsize

    def gather(self, indices: Ints) -> Array:
        """Read the entries at increasing `indices`, at most a chunk of entries at a time."""
        parts = [np.empty(0, self.dtype)]
        while indices.size:
            start = int(indices[0])
            count = int(np.searchsorted(indices, start + CHUNK))
            parts.append(self.span(start, int(indices[count - 1]) + 1)[indices[:count] - start])
            indices = indices[count:]
        return np.concatenate(parts)

    def expect(self, holds: bool, i: int, value: int, expected: str) -> None:
        if not holds:
            raise format_error(self.file.path, f"{self.name}[{i}]", value, expected)

    def expect_all(self, holds: npt.NDArray[np.bool_], start: int, values: Array, expected: str) -> None:
        """`expect` for consecutive entries from `start` on; the error names the first bad one."""
        if not holds.all():
            first = int(holds.argmin())
            self.expect(False, start + first, int(values[first]), expected)


def format_error(path: Path, field: str, value: object, expected: str) -> DataFormatError:
    """Return an error that names the file, the field, its value and the expected value."""
    return DataFormatError(f"{path}: {field} = {value}; expected {expected}")


def _missing(path: Path) -> str:
    ending = path.with_suffix("").suffix
    hint = f" (give the prefix without {ending})" if ending in (".bin", ".idx") else ""
    return (
        f"no dataset file at {path}{hint}; a dataset is a PREFIX.bin and a PREFIX.idx, "
        "made from text by preprocessing (triaxis preprocess)"
    )

"""Reads untrusted files: rectangles of tensors from safetensors files, and small files completely.

Nothing is unpickled, mapped or executed. An invalid, damaged or unreadable file raises a `CheckpointError` with its
name.
"""

import io
import math
import stat
from pathlib import Path
from typing import Any, cast

import orjson
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.manifest import DTYPES, DtypeName
from engine.checkpoint.rectangles import Shape, is_inside, slice_notation
from engine.checkpoint.storage import CHUNK_BYTES
from engine.errors import CheckpointError
from engine.parallel.table import Rectangle

_READ_BYTES = 1 << 30  # the system reads at most 2 GiB at once
_LFS, _LFS_BYTES = b"version https://git-lfs", 1024


class SafetensorsFile:
    """A safetensors file opened for reading, with a validated header; tensors are read on demand.

    The data are read, not mapped, so that a shrinking file or failing disk raises an error instead of killing the
    process, and pages of the file do not count as memory of this process.

    Raises:
        CheckpointError: missing, not a regular file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        try:
            with safe_open(path, framework="pt"):  # validates length, JSON, dtypes, offsets, no gap or overlap
                pass
            with open(path, "rb") as content:
                length = int.from_bytes(content.read(8), "little")
                self._table: dict[str, Any] = orjson.loads(content.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            if path.stat().st_size < _LFS_BYTES and path.read_bytes().startswith(_LFS):
                raise CheckpointError(
                    f"{path} is a pointer of Git LFS; `git lfs pull` or `hf download` gets the weights"
                ) from None
            raise CheckpointError(f"{path} is damaged: {error}") from None
        self._data_start = 8 + length
        self._table.pop("__metadata__", None)

    @property
    def names(self) -> list[str]:
        return list(self._table)

    def shape(self, name: str) -> Shape:
        return tuple(self._table[name]["shape"])

    def dtype(self, name: str) -> str:
        """Return the format's name of the dtype, such as `BF16`."""
        return self._table[name]["dtype"]

    def tensor(self, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """Read a tensor or a rectangle of it into new memory; for a rectangle, only its rows are read.

        Raises:
            CheckpointError: no such tensor or rectangle, an unsupported dtype, or the file cannot be read.
        """
        if name not in self._table or self.dtype(name) not in DTYPES:
            kind = f"of dtype {self.dtype(name)}" if name in self._table else "not there"
            raise CheckpointError(f"{self.path}: cannot read {name}: {kind}")
        shape = self.shape(name)
        if rectangle is not None and rectangle.start:
            if not is_inside(shape, rectangle):
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(shape)}, wanted {slice_notation(rectangle)}"
                )
            rows = self._rows(name, rectangle.start[0], (rectangle.extent[0], *shape[1:]))
            inner = zip(rectangle.start[1:], rectangle.extent[1:], strict=True)
            return rows[(slice(None), *(slice(first, first + count) for first, count in inner))]
        return self._rows(name, 0, shape)

    def _rows(self, name: str, first: int, shape: Shape) -> Tensor:
        """Read a tensor of `shape` from row `first` on."""
        tensor = torch.empty(shape, dtype=DTYPES[cast(DtypeName, self.dtype(name))])
        offset = self._data_start + self._table[name]["data_offsets"][0]
        offset += first * math.prod(shape[1:]) * tensor.itemsize
        try:
            with open(self.path, "rb", buffering=0) as content:
                content.seek(offset)
                _read_fully(content, tensor.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read {name}: {error}") from None
        return tensor


def _read_fully(content: io.FileIO, into: memoryview) -> None:
    while into:
        count = content.readinto(into[:_READ_BYTES])
        if not count:
            raise OSError("the file ends too early")
        into = into[count:]


def file_hash(path: Path) -> str:
    """Return the xxh3-64 hash of a file's bytes."""
    require_file(path)
    digest = xxhash.xxh3_64()
    try:
        with open(path, "rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return digest.hexdigest()


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a small file.

    Raises:
        CheckpointError: missing, unreadable, or larger than `limit` bytes.
    """
    if (size := require_file(path)) > limit:
        raise CheckpointError(f"{path} has {size} bytes, expected at most {limit}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def require_file(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        CheckpointError: missing, unreadable, or not a regular file (opening a pipe would block forever).
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        link = " (a link to a missing file: the download is incomplete)" if path.is_symlink() else ""
        raise CheckpointError(f"{path} is missing{link}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size

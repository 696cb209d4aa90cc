"""Every file operation of a checkpoint, each one numbered.

Writing goes through one object that announces each operation before it happens, so that a test can die, or fail, at
operation k for every k. Nothing is buffered here: a file holds what was written when the process ends at any moment.
Rejected: `safetensors.torch.save_file`, which needs every tensor in host memory at once and hashes nothing.
"""

import io
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.rectangles import (
    DTYPE_NAMES,
    DTYPES,
    DtypeName,
    Rectangle,
    Shape,
    StoredFile,
    describe,
    is_inside,
)
from engine.errors import CheckpointError

CHUNK_BYTES = 1 << 20  # small enough to stay in a core's cache between the hashes and the write
_READ_BYTES = 1 << 30  # the system reads at most 2 GiB at once

Hook = Callable[[int, str, Path], None]


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `load` is called when its turn comes, so that only one needs to exist at a time."""

    key: str
    shape: Shape
    dtype: torch.dtype  # as stored; converted chunk by chunk when `load` gives another
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Written:
    """A safetensors file as it was written, with the hash of every tensor in it."""

    file: StoredFile
    hashes: dict[str, str]


class Storage:
    """File operations of one writer.

    Args:
        hook: called with (number, operation, path) before each operation.
    """

    def __init__(self, hook: Hook | None = None) -> None:
        self.operations = 0
        self._hook = hook

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        self._operation("make_directory", path)
        path.mkdir(parents=exist_ok, exist_ok=exist_ok)

    def names(self, path: Path) -> list[str]:
        """What lies in a directory, sorted."""
        self._operation("list", path)
        return sorted(os.listdir(path))

    def size(self, path: Path) -> int:
        self._operation("size", path)
        return path.stat().st_size

    def read(self, path: Path) -> bytes:
        self._operation("read", path)
        return path.read_bytes()

    def write(self, path: Path, content: bytes) -> StoredFile:
        """A new file, on the disk when this returns."""
        with self._create(path) as out:
            out.write(memoryview(content))
        return out.stored()

    def copy(self, source: Path, path: Path) -> StoredFile:
        with open(source, "rb") as content, self._create(path) as out:
            while chunk := content.read(CHUNK_BYTES):
                out.write(memoryview(chunk))
        return out.stored()

    def write_safetensors(
        self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
    ) -> Written:
        """Stream tensors into a new safetensors file, hashing the bytes of each on the way."""
        ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned
        hashes = {}
        with self._create(path) as out:
            out.write(memoryview(_header(ordered, metadata)))
            for entry in ordered:
                digest = xxhash.xxh3_64()
                tensor = entry.load()
                if tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{entry.key}: shape {list(tensor.shape)}, expected {list(entry.shape)}")
                for chunk in byte_chunks(tensor, entry.dtype):
                    digest.update(chunk)
                    out.write(chunk)
                hashes[entry.key] = digest.hexdigest()
        return Written(out.stored(), hashes)

    def rename(self, source: Path, target: Path) -> None:
        self._operation("rename", target)
        os.rename(source, target)

    def replace_text(self, path: Path, text: str) -> None:
        """Readers see the old text or the new one, never anything between."""
        temporary = path.with_name(path.name + ".partial")
        self.remove(temporary)
        self.write(temporary, text.encode())
        self._operation("replace", path)
        os.replace(temporary, path)
        self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory survive a power cut."""
        self._operation("sync_directory", path)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """A file or a directory with all it holds; nothing when there is none."""
        self._operation("remove", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def _create(self, path: Path) -> Iterator["_Output"]:
        self._operation("create", path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        out = _Output(fd, path, self._operation)
        try:
            yield out
            self._operation("sync", path)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _operation(self, name: str, path: Path) -> None:
        self.operations += 1
        if self._hook:
            self._hook(self.operations, name, path)


class _Output:
    """An open file that knows its size and hash."""

    def __init__(self, fd: int, path: Path, operation: Callable[[str, Path], None]) -> None:
        self._fd, self._path, self._operation = fd, path, operation
        self._size = 0
        self._digest = xxhash.xxh3_64()

    def write(self, content: memoryview) -> None:
        self._operation("write", self._path)
        self._digest.update(content)
        self._size += len(content)
        try:
            while content:
                content = content[os.write(self._fd, content) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None  # the system names no file here

    def stored(self) -> StoredFile:
        return StoredFile(size=self._size, xxh3_64=self._digest.hexdigest())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON table of a safetensors file, padded so that the data start at a multiple of 8."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        described = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        table[entry.key] = described
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor as `dtype`, on the host, a few megabytes at a time."""
    flat = tensor.detach().reshape(-1)
    count = CHUNK_BYTES // dtype.itemsize
    for begin in range(0, flat.numel(), count):
        chunk = flat[begin : begin + count].to(device="cpu", dtype=dtype)
        yield chunk.view(torch.uint8).numpy().data


def tensor_hash(tensor: Tensor) -> str:
    """xxh3-64 of a tensor's bytes."""
    digest = xxhash.xxh3_64()
    for chunk in byte_chunks(tensor, tensor.dtype):
        digest.update(chunk)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """xxh3-64 of a file's bytes."""
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
    """A small file's content.

    Raises:
        CheckpointError: missing, unreadable, or larger than `limit` bytes.
    """
    if (size := require_file(path)) > limit:
        raise CheckpointError(f"{path} has {size} bytes, expected at most {limit}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


class SafetensorsFile:
    """A safetensors file opened for reading: header validated, tensors read when asked for.

    The data are read and not mapped: a file that shrinks or a disk that fails is then an error and not the end of the
    process, and what was read does not count as this process's memory.

    Raises:
        CheckpointError: missing, not a regular file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        try:
            with safe_open(path, framework="pt"):  # believes nothing: length, JSON, dtypes, offsets, no hole or overlap
                pass
            with open(path, "rb") as content:
                length = int.from_bytes(content.read(8), "little")
                self._table: dict[str, Any] = orjson.loads(content.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        self._data_start = 8 + length
        self._table.pop("__metadata__", None)

    @property
    def names(self) -> list[str]:
        return list(self._table)

    def shape(self, name: str) -> Shape:
        return tuple(self._table[name]["shape"])

    def dtype(self, name: str) -> str:
        """The format's name of it, as in `BF16`."""
        return self._table[name]["dtype"]

    def tensor(self, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """A tensor of `DTYPES` in memory of its own; of a rectangle of it, only the rows are read.

        Raises:
            CheckpointError: no such tensor or rectangle, a dtype that we do not read, or the file cannot be read.
        """
        if name not in self._table or self.dtype(name) not in DTYPES:
            kind = f"of dtype {self.dtype(name)}" if name in self._table else "not there"
            raise CheckpointError(f"{self.path}: cannot read {name}: {kind}")
        shape = self.shape(name)
        if rectangle is not None and rectangle.start:
            if not is_inside(shape, rectangle):
                raise CheckpointError(f"{self.path}: {name} has shape {list(shape)}, wanted {describe(rectangle)}")
            rows = self._rows(name, rectangle.start[0], (rectangle.extent[0], *shape[1:]))
            inner = zip(rectangle.start[1:], rectangle.extent[1:], strict=True)
            return rows[(slice(None), *(slice(first, first + count) for first, count in inner))]
        return self._rows(name, 0, shape)

    def _rows(self, name: str, first: int, shape: Shape) -> Tensor:
        """Rows from `first` on, as many as `shape` has."""
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


def require_file(path: Path) -> int:
    """The size of a regular file.

    Raises:
        CheckpointError: there is none, or it cannot be read; a pipe is refused too, for opening it would wait forever.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size

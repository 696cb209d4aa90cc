"""The file operations that write a checkpoint or an export, all numbered.

All writes go through one object that calls a hook before each operation, so that a test can fail or exit at operation k
for every k. Writes are unbuffered: if the process ends, a file contains everything written so far. Alternative
considered: `safetensors.torch.save_file`, which needs all tensors in host memory at once and computes no hashes.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from engine.checkpoint.manifest import DTYPE_NAMES, StoredFile
from engine.checkpoint.rectangles import Shape
from engine.errors import ConfigError, StorageError

CHUNK_BYTES = 2 << 20  # small enough to stay in a core's cache between hashing and writing

OnOperation = Callable[[int, str, Path], None]


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `load` is called just before the write and returns its elements in order, in one tensor or in
    several, one of which at a time is in memory.
    """

    key: str
    shape: Shape
    dtype: torch.dtype  # of the file; converted chunk by chunk if `load` returns another
    load: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Written:
    """A written safetensors file, with the hash of every tensor in it."""

    file: StoredFile
    hashes: dict[str, str]


class Storage:
    """The file operations of one writer.

    Args:
        hook: called with (number, operation, path) before each operation.
    """

    def __init__(self, hook: OnOperation | None = None) -> None:
        self.operations = 0
        self._hook = hook

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        self._operation("make_directory", path)
        path.mkdir(parents=exist_ok, exist_ok=exist_ok)

    def names(self, path: Path) -> list[str]:
        """Return the sorted names of the entries of a directory."""
        self._operation("list", path)
        return sorted(os.listdir(path))

    def size(self, path: Path) -> int:
        self._operation("size", path)
        return path.stat().st_size

    def read(self, path: Path) -> bytes:
        self._operation("read", path)
        return path.read_bytes()

    def write(self, path: Path, content: bytes) -> StoredFile:
        """Create a file and sync it to disk."""
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
        """Write tensors to a new safetensors file, hashing the bytes of each on the way.

        A thread writes a chunk while the next is read, converted and hashed.
        """
        ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned
        hashes = {}
        buffers = cycle(torch.empty(2, CHUNK_BYTES, dtype=torch.uint8))
        with self._create(path) as out, ThreadPoolExecutor(1) as thread:
            writing = thread.submit(out.write, memoryview(_header(ordered, metadata)))
            for entry in ordered:
                digest, size = xxhash.xxh3_64(), 0
                for chunk in chain.from_iterable(byte_chunks(part, entry.dtype, buffers) for part in entry.load()):
                    digest.update(chunk)
                    size += len(chunk)
                    writing.result()
                    writing = thread.submit(out.write, chunk)
                if size != (expected := math.prod(entry.shape) * entry.dtype.itemsize):
                    raise ValueError(f"{entry.key}: {size} bytes, expected {expected} for shape {list(entry.shape)}")
                hashes[entry.key] = digest.hexdigest()
            writing.result()
        return Written(out.stored(), hashes)

    def rename(self, source: Path, target: Path) -> None:
        self._operation("rename", target)
        os.rename(source, target)

    def replace_text(self, path: Path, text: str) -> None:
        """Replace a small file atomically: readers see the old or the new text."""
        temporary = path.with_name(path.name + ".partial")
        self.remove(temporary)
        self.write(temporary, text.encode())
        self._operation("replace", path)
        os.replace(temporary, path)
        self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        """Call fsync on a directory, so that the names in it survive a power failure."""
        self._operation("sync_directory", path)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Remove a file, or a directory with its content; no error if it does not exist."""
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
    """An open file that tracks its size and hash."""

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
            raise OSError(
                error.errno, error.strerror, str(self._path)
            ) from None  # the system's error does not name the file

    def stored(self) -> StoredFile:
        return StoredFile(size=self._size, xxh3_64=self._digest.hexdigest())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Return length and JSON table of a safetensors file, padded so that the data start at a multiple of 8."""
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


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `target` on exit and removed on an exception.

    Raises:
        ConfigError: `target` exists and is not an empty directory.
        StorageError: the directory cannot be created.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; name another directory, or remove it")
    files, partial = Storage(), target.with_name(target.name + ".partial")
    try:
        files.remove(partial)
        files.make_directory(partial, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create the directory {target}: {error.strerror}; name another directory") from error
    try:
        yield partial
        files.sync_directory(partial)
        files.rename(partial, target)
        files.sync_directory(target.parent)
    except BaseException:
        files.remove(partial)
        raise


def byte_chunks(tensor: Tensor, dtype: torch.dtype, buffers: Iterator[Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous tensor, converted to `dtype` on the host in the next of `buffers`, in chunks."""
    flat = tensor.detach().reshape(-1)
    count = CHUNK_BYTES // dtype.itemsize
    for begin in range(0, flat.numel(), count):
        chunk = flat[begin : begin + count]
        if chunk.dtype != dtype or chunk.device.type != "cpu":
            chunk = next(buffers).view(dtype)[: chunk.numel()].copy_(chunk)
        yield tensor_bytes(chunk)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def tensor_hash(tensor: Tensor) -> str:
    """Return the xxh3-64 hash of the bytes of a tensor on the host."""
    return xxhash.xxh3_64_hexdigest(tensor_bytes(tensor))

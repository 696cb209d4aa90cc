"""Block checksums of a dataset, `PREFIX.checksums`: the xxh3-64 hash of every 4 MiB of its files.

They tell whether bytes have changed since the dataset was written or sealed, also where the changed bytes are still
valid tokens. Blocks can be checked alone, so that a run checks what it reads first without reading the rest. Format,
little-endian: magic, version, the sizes of `.idx`, `.bin`, `.mask.bin` and `.json` (2^64 - 1: no such file), the hashes
of the blocks of each file in this order, uint64, and the xxh3-64 hash of all that precedes it. Alternative considered:
one hash per file, as `sha256sum` gives; checking a block of a terabyte would then read the terabyte.
"""

import os
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from engine.data.storage.files import CheckedFile, format_error
from engine.data.storage.format import dataset_file
from engine.errors import DataFormatError

SEALED_BLOCK = 4 << 20  # bytes
READERS = 8  # threads; a solid-state disk needs several requests at a time
_QUEUED = 1024  # blocks
SEALED_KINDS = ("idx", "bin", "mask.bin", "json")
_MAGIC, _VERSION = b"TRXSUMS\x00", 1
_HEADER = struct.Struct("<8sQ4Q")
_ABSENT = (1 << 64) - 1

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class FileChecksums:
    """Size in bytes of a file, and the hashes of its blocks."""

    size: int
    hashes: Hashes


@dataclass(frozen=True)
class Checksums:
    """The checksums of the files of a dataset, by kind; kinds without a file are left out."""

    prefix: Path
    files: Mapping[str, FileChecksums]

    def identity(self) -> str:
        """Return a hash of the tokens, documents and masks, independent of the description."""
        content = Checksums(self.prefix, {kind: file for kind, file in self.files.items() if kind != "json"})
        return xxhash.xxh3_64_hexdigest(content.encode())

    def check(self, kind: str, block: int, actual: int) -> None:
        """Check the hash of a block.

        Raises:
            DataFormatError: the block has changed.
        """
        stored = int(self.files[kind].hashes[block])
        if stored != actual:
            start = block * SEALED_BLOCK
            stop = min(start + SEALED_BLOCK, self.files[kind].size)
            raise self._changed(kind, f"xxh3-64 of bytes {start} .. {stop - 1}", f"{actual:016x}", f"{stored:016x}")

    def check_sizes(self, *, may_lack: tuple[str, ...] = ()) -> None:
        """Check that the dataset consists of the listed files, in their sizes; those of `may_lack` may be missing.

        Raises:
            DataFormatError: it does not.
        """
        for kind in SEALED_KINDS:
            actual, listed = file_size(dataset_file(self.prefix, kind)), self.files.get(kind)
            if actual != (None if listed is None else listed.size) and not (actual is None and kind in may_lack):
                expected = "no such file" if listed is None else f"{listed.size} bytes"
                raise self._changed(kind, "size", "missing" if actual is None else f"{actual} bytes", expected)

    def encode(self) -> bytes:
        """Return the content of the file."""
        sizes = [self.files[kind].size if kind in self.files else _ABSENT for kind in SEALED_KINDS]
        hashes = [self.files[kind].hashes.astype("<u8").tobytes() for kind in SEALED_KINDS if kind in self.files]
        body = b"".join([_HEADER.pack(_MAGIC, _VERSION, *sizes), *hashes])
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")

    def _changed(self, kind: str, field: str, value: str, expected: str) -> DataFormatError:
        path = dataset_file(self.prefix, "checksums")
        advice = (
            f"as {path} says; restore the file, or, if the change is meant, run triaxis inspect {self.prefix} --seal"
        )
        return format_error(dataset_file(self.prefix, kind), field, value, f"{expected}, {advice}")


class BlockHasher:
    """Hashes the blocks of a file while it is written."""

    def __init__(self) -> None:
        self._size, self._hashes, self._block = 0, array("Q"), xxhash.xxh3_64()

    def update(self, content: bytes | memoryview) -> None:
        """Append `content` to the file."""
        rest = memoryview(content)
        rest = rest.cast("B") if rest.nbytes else memoryview(b"")
        while rest:
            part = rest[: SEALED_BLOCK - self._size % SEALED_BLOCK]
            self._block.update(part)
            self._size += len(part)
            rest = rest[len(part) :]
            if self._size % SEALED_BLOCK == 0:
                self._end_block()

    def finish(self) -> FileChecksums:
        """Return the checksums of the complete file."""
        if self._size % SEALED_BLOCK:
            self._end_block()
        return FileChecksums(self._size, np.array(self._hashes, np.uint64))

    def _end_block(self) -> None:
        self._hashes.append(self._block.intdigest())
        self._block.reset()


def read_checksums(prefix: Path) -> Checksums | None:
    """Read the checksums of a dataset, and check the sizes of its files; None if it has none.

    Raises:
        DataFormatError: the checksums are damaged, or a file has another size.
    """
    path = dataset_file(prefix, "checksums")
    if not path.exists():
        return None
    file = CheckedFile(path)
    smallest = _HEADER.size + 8
    file.expect(file.size >= smallest, "size", f"{file.size} bytes", f"at least {smallest}, a header and a hash")
    magic, version, *sizes = _HEADER.unpack(file.read(0, _HEADER.size))
    file.expect(magic == _MAGIC, "magic", magic, repr(_MAGIC))
    file.expect(version == _VERSION, "version", version, str(_VERSION))
    counts = [0 if size == _ABSENT else num_blocks(size) for size in sizes]
    expected = smallest + 8 * sum(counts)
    file.expect(file.size == expected, "size", f"{file.size} bytes", f"{expected} for files of {sizes} bytes")
    body = file.read(0, file.size)
    stored, actual = int.from_bytes(body[-8:], "little"), xxhash.xxh3_64_intdigest(body[:-8])
    file.expect(stored == actual, "xxh3-64 of the content", f"{actual:016x}", f"{stored:016x}, as its end says")
    parts = np.split(np.frombuffer(body, "<u8", offset=_HEADER.size, count=sum(counts)), np.cumsum(counts)[:-1])
    listed = zip(SEALED_KINDS, sizes, parts, strict=True)
    checksums = Checksums(prefix, {kind: FileChecksums(size, part) for kind, size, part in listed if size != _ABSENT})
    checksums.check_sizes(may_lack=("json",))  # reading works without it
    return checksums


def hash_blocks(
    file: CheckedFile, blocks: Sequence[int], check: Callable[[int, bytes, int], None]
) -> Iterator[tuple[int, int]]:
    """Read blocks of a file in several threads, and yield the size and the hash of each, in order.

    Args:
        check: called in a thread with the number, the content and the hash of each block; may raise.
    """

    def read(block: int) -> tuple[int, int]:
        start = block * SEALED_BLOCK
        content = file.read(start, min(SEALED_BLOCK, file.size - start))
        hashed = xxhash.xxh3_64_intdigest(content)
        check(block, content, hashed)
        return len(content), hashed

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(blocks), _QUEUED):
            yield from pool.map(read, blocks[start : start + _QUEUED])


def num_blocks(size: int) -> int:
    """Return the number of blocks of a file of `size` bytes."""
    return -(-size // SEALED_BLOCK)


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it does not exist."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None

"""Writes token datasets atomically, with checksums: all files of a dataset, or none."""

import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from engine.data.storage.checksums import BlockHasher, Checksums, FileChecksums
from engine.data.storage.files import Array
from engine.data.storage.format import HEADER, MAGIC, MAX_SEQUENCE_LENGTH, TOKEN_DTYPES, VERSION, chunks, dataset_file
from engine.data.storage.info import DatasetInfo
from engine.data.storage.output import OutputOwner
from engine.data.storage.reader import IndexedDataset, OnVerified
from engine.errors import DataError, StorageError

FILES = ("bin", "mask.bin", "json", "checksums", "idx")  # in the order of their renames: the index last


class IndexedDatasetWriter:
    """Writes a dataset with one sequence per document. A context manager.

    Files are written under `*.partial` names. Exiting syncs and renames them, the index last, so an index exists only
    if its data are complete; an exception removes them. Only one writer at a time may write to a prefix. Uses four
    bytes of memory per document.

    Args:
        prefix: files are `PREFIX.bin`, `PREFIX.idx`, `PREFIX.checksums` and, with `info`, `PREFIX.json`. Existing files
            are replaced.
        dtype: an integer type; see `token_dtype`.
        info: written to `PREFIX.json` with the counts filled in. May be set until the context exits.
        masked: a fine-tuning dataset: every document has a target mask, written to `PREFIX.mask.bin`.
    """

    def __init__(
        self, prefix: Path | str, dtype: npt.DTypeLike, info: DatasetInfo | None = None, *, masked: bool = False
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in TOKEN_DTYPES.items() if np.dtype(known) == self.dtype]
        if not codes or self.dtype.kind not in "iu":
            raise ValueError(f"dtype = {self.dtype.name}; the format stores int8 .. int64, uint8 and uint16")
        self._code = codes[0]
        self.info = info
        self._masked = masked
        self.num_tokens = 0
        self._lengths = array("i")
        self._owner = OutputOwner(dataset_file(prefix, "lock"), [dataset_file(prefix, kind) for kind in FILES])
        self._files: dict[str, _HashedFile] = {}

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> "IndexedDatasetWriter":
        """Take the prefix.

        Raises:
            ConfigError: another writer has it.
        """
        try:
            with storage_errors(self.prefix):
                self._owner.acquire()
                self._data = self._open("bin")
                self._mask = self._open("mask.bin") if self._masked else None
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with storage_errors(self.prefix):
                    self._commit()
        finally:
            self._discard()

    def add_document(self, tokens: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> None:
        """Append one document, which may be empty; see `add_documents`."""
        ids = np.asarray(tokens, dtype=None if len(tokens) else self.dtype)  # type: ignore[arg-type]
        self.add_documents(ids, [len(ids)], mask)

    def add_documents(self, flat_ids: npt.ArrayLike, lengths: Iterable[int], mask: npt.ArrayLike | None = None) -> None:
        """Append documents: their concatenated ids, their lengths and, for a masked dataset, their concatenated mask.

        Raises:
            DataError: an id does not fit the dtype, or a document is too long for the format.
        """
        ids = np.asarray(flat_ids)
        counts = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths), dtype=np.int64)
        if ids.ndim != 1 or counts.sum() != ids.size or (counts < 0).any():
            raise ValueError(f"{ids.shape} ids for documents of {counts.sum()} tokens together")
        if counts.size and counts.max() > MAX_SEQUENCE_LENGTH:
            raise DataError(f"a document has {counts.max():,} tokens; the format allows {MAX_SEQUENCE_LENGTH:,}")
        targets = None if mask is None else np.asarray(mask).astype(bool)
        if self._masked != (targets is not None) or (targets is not None and targets.shape != ids.shape):
            raise ValueError(
                f"masked = {self._masked}, {ids.shape} ids, mask {None if targets is None else targets.shape}"
            )
        self._check_ids(ids)
        with storage_errors(self.prefix):
            self._data.write(np.ascontiguousarray(ids, self.dtype).data)
            if self._mask is not None and targets is not None:
                self._mask.write(targets.astype(np.uint8).data)
        self._lengths.frombytes(counts.astype(np.int32).tobytes())
        self.num_tokens += ids.size

    def _check_ids(self, ids: Array) -> None:
        """Reject ids that would overflow the dtype."""
        if ids.size == 0:
            return
        low, high, top = int(ids.min()), int(ids.max()), int(np.iinfo(self.dtype).max)
        if low < 0 or high > top:
            raise DataError(
                f"{dataset_file(self.prefix, 'bin')}: token id {low if low < 0 else high} does not fit "
                f"{self.dtype.name} (0 .. {top}); choose the dtype by the tokenizer's vocabulary size"
            )

    def _open(self, kind: str) -> "_HashedFile":
        self._files[kind] = _HashedFile(self._partial(kind))
        return self._files[kind]

    def _commit(self) -> None:
        if self.info is not None:
            counted = {"num_documents": self.num_documents, "num_tokens": self.num_tokens}
            described = self.info.model_copy(update=counted)
            self._open("json").write(described.model_dump_json(indent=2).encode() + b"\n")
        self._write_index(self._open("idx"))
        checksums = Checksums(self.prefix, {kind: file.finish() for kind, file in self._files.items()})
        write_synced(self._partial("checksums"), checksums.encode())
        for kind in reversed(FILES[1:]):  # an index must never exist next to data of another dataset
            dataset_file(self.prefix, kind).unlink(missing_ok=True)
        for kind in FILES:
            if kind in self._files or kind == "checksums":
                os.replace(self._partial(kind), dataset_file(self.prefix, kind))
        sync_directory(self.prefix.parent)

    def _write_index(self, file: "_HashedFile") -> None:
        n = len(self._lengths)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if n else np.empty(0, np.int32)
        file.write(HEADER.pack(MAGIC, VERSION, self._code, n, n + 1))
        file.write(lengths.astype("<i4", copy=False).data)
        end = 0
        for start, stop in chunks(n):
            ends = end + np.cumsum(lengths[start:stop], dtype=np.int64) * self.dtype.itemsize
            file.write(np.concatenate(([end], ends[:-1])).astype("<i8").data)
            end = int(ends[-1])
        for start, stop in chunks(n + 1):
            file.write(np.arange(start, stop, dtype="<i8").data)

    def _discard(self) -> None:
        """Remove partial files; after a commit there are none."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._owner.release()

    def _partial(self, kind: str) -> Path:
        return self._owner.partial(dataset_file(self.prefix, kind))


def seal(prefix: Path | str, vocab_size: int | None = None, on_progress: OnVerified | None = None) -> None:
    """Verify a dataset that has no checksums, or old ones, and write its checksums.

    Args:
        vocab_size, on_progress: see `IndexedDataset.verify`.

    Raises:
        DataFormatError: the dataset is damaged.
        ConfigError: a writer has the prefix.
    """
    path = dataset_file(prefix, "checksums")
    owner = OutputOwner(dataset_file(prefix, "lock"), [path])
    try:
        with storage_errors(Path(prefix)):
            data = IndexedDataset(prefix, sealed=False)
            owner.acquire()
            write_synced(owner.partial(path), data.verify(vocab_size, on_progress).encode())
            os.replace(owner.partial(path), path)
            sync_directory(path.parent)
    finally:
        owner.release()


class _HashedFile:
    """A new file whose blocks are hashed as they are written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self._hasher = BlockHasher()

    def write(self, content: bytes | memoryview) -> None:
        self._hasher.update(content)
        self._file.write(content)

    def finish(self) -> FileChecksums:
        """Sync and close the file."""
        _sync(self._file)
        self._file.close()
        return self._hasher.finish()

    def close(self) -> None:
        self._file.close()


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and make its content durable."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(prefix: Path) -> Iterator[None]:
    """Turn errors of the operating system into `StorageError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"cannot write the dataset {prefix}: {reason}; free space or choose another prefix"
        ) from error

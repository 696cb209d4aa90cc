"""Token datasets on disk: `PREFIX.bin` + `PREFIX.idx`, byte-compatible with Megatron-LM's IndexedDataset.

Fine-tuning data have a `PREFIX.mask.bin` beside them: a byte a token, 1 where the token is a target.

The reader believes nothing. The header, the sizes and both ends of every table are checked at each opening;
whole tables are checked at opening while they are small, entry by entry on access beyond that, and completely
by `verify`. So a dataset of 10^12 tokens opens in milliseconds, and a damaged one is a `DataFormatError`.
Rejected: trusting the index, as readers of this format do; a truncated copy then trains on garbage, or kills
the run days later.

Legend: n sequences; d document indices, one more than documents.
"""

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from engine.data.storage.files import CHUNK, Array, CheckedFile, Ints, Table, format_error
from engine.errors import DataError, StorageError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, n, d
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}  # by code
MAX_SEQUENCE_LENGTH = (1 << 31) - 1  # lengths are int32
CHECKED_AT_OPENING = 1 << 20  # tables of up to so many entries are checked completely at opening

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,100}$")]  # may be shown as it is


class SourceFile(BaseModel):
    """A file that a dataset was made from."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: NonNegativeInt


class DatasetInfo(BaseModel):
    """What `PREFIX.json` tells about a dataset. Reading tokens works without it."""

    model_config = ConfigDict(frozen=True)

    tokenizer_kind: Name
    tokenizer_hash: Name
    vocab_size: PositiveInt
    eod_id: NonNegativeInt
    num_documents: NonNegativeInt = 0
    num_tokens: NonNegativeInt = 0
    version: str = ""
    sources: tuple[SourceFile, ...] = ()
    skipped: NonNegativeInt = 0
    chat_template: str | None = None  # of fine-tuning data, Jinja
    end_of_turn_id: NonNegativeInt | None = None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type tokens are stored in: uint16 for fewer than 65,500 entries, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def dataset_file(prefix: Path | str, kind: str) -> Path:
    """`PREFIX.bin`, `.idx`, `.json` or `.mask.bin`; the prefix may itself contain dots."""
    return Path(f"{prefix}.{kind}")


class IndexedDataset:
    """A dataset opened for reading. Offsets count tokens from the start of the `.bin`.

    A copy (pickled into a worker process) opens the files again by name.

    Raises:
        DataError: a file is missing.
        DataFormatError: a file is damaged. Later reads raise it too, where they meet damage.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._index = CheckedFile(dataset_file(prefix, "idx"))
        self._data = CheckedFile(dataset_file(prefix, "bin"), mapped=True)
        self.dtype, self.num_sequences, document_indices = _read_header(self._index)
        n, self.num_documents = self.num_sequences, document_indices - 1
        self.num_tokens = self._data.size // self.dtype.itemsize
        self._lengths = Table(self._index, "lengths", "<i4", HEADER.size, n)
        self._pointers = Table(self._index, "pointers", "<i8", HEADER.size + 4 * n, n)
        self._documents = Table(self._index, "documents", "<i8", HEADER.size + 12 * n, document_indices)
        self._tokens = Table(self._data, "tokens", self.dtype, 0, self.num_tokens)
        self._check_ends()
        self._mask = self._open_mask()
        if n + document_indices <= CHECKED_AT_OPENING:
            self._check_tables(lambda num_bytes: None)
        self.info = self._read_info()

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[Path]]:
        return IndexedDataset, (self.prefix,)

    @property
    def num_bytes(self) -> int:
        """Of all files but the description."""
        return self._index.size + self._data.size + (len(self._mask) if self._mask else 0)

    @property
    def has_mask(self) -> bool:
        """These are fine-tuning data: each token is a target or not."""
        return self._mask is not None

    def mask(self, start: int, count: int) -> Array:
        """Which of the tokens `[start, start + count)` are targets: uint8, read-only, 0 or 1.

        Raises:
            DataFormatError: something else stands there.
        """
        assert self._mask is not None, "only fine-tuning data have a mask"
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens} in {self.prefix}")
        self._mask.file.check_size()
        values = self._mask.span(start, start + count)
        self._mask.expect_all(values <= 1, start, values, "0 or 1")
        return values

    def tokens(self, start: int, count: int) -> Array:
        """Tokens `[start, start + count)`: read-only, in the type they are stored in."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens} in {self.prefix}")
        self._data.check_size()
        return self._tokens.span(start, start + count)

    def document_start(self, j: int) -> int:
        """Token offset of document `j`; `j = num_documents` gives `num_tokens`."""
        if not 0 <= j <= self.num_documents:
            raise IndexError(f"document {j} of {self.num_documents} in {self.prefix}")
        sequence = self._documents[j]
        if sequence == self.num_sequences:
            return self.num_tokens
        self._documents.expect(0 <= sequence < self.num_sequences, j, sequence, f"0 .. {self.num_sequences}")
        pointer = self._pointers[sequence]
        offset, rest = divmod(pointer, self.dtype.itemsize)
        sound = rest == 0 and 0 <= offset <= self.num_tokens
        self._pointers.expect(sound, sequence, pointer, f"whole tokens inside {self._data.size} bytes")
        return offset

    def document_starts_in(self, start: int, stop: int) -> Ints:
        """Token offsets, increasing, at which documents start inside `(start, stop)`, both excluded."""
        j = bisect_right(range(self.num_documents), start, key=self.document_start)
        starts = [start]
        while j < self.num_documents and (offset := self.document_start(j)) < stop:
            self._documents.expect(offset >= starts[-1], j, offset, f"a token from {starts[-1]} on")
            if offset > starts[-1]:  # an empty document starts where the next one does
                starts.append(offset)
            j += 1
        return np.array(starts[1:], np.int64)

    def document_at(self, offset: int) -> int:
        """The document that holds token `offset`."""
        if not 0 <= offset < self.num_tokens:
            raise IndexError(f"token {offset} of {self.num_tokens} in {self.prefix}")
        return bisect_right(range(self.num_documents), offset, key=self.document_start) - 1

    def document_lengths(self) -> Iterator[Ints]:
        """Tokens of each document, in order, a chunk at a time."""
        for start, stop in _chunks(self.num_documents):
            sequences = self._documents.span(start, stop + 1)
            sound = (sequences >= 0) & (sequences <= self.num_sequences)
            sound[1:] &= sequences[1:] >= sequences[:-1]
            self._documents.expect_all(sound, start, sequences, f"rising, at most {self.num_sequences}")
            inner = sequences[sequences < self.num_sequences]
            starts = np.full(sequences.size, self.num_tokens, np.int64)
            starts[: inner.size] = self._pointers.gather(inner) // self.dtype.itemsize
            yield np.diff(starts)

    def verify(self, vocab_size: int | None, progress: Progress | None = None) -> None:
        """Check every entry of the index and every token id (against `vocab_size` where it is known).

        Raises:
            DataFormatError: names the first offending entry.
        """
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, self.num_bytes)

        self._check_tables(advance)
        self._check_tokens(vocab_size, advance)
        for start, stop in _chunks(len(self._mask) if self._mask else 0):
            self.mask(start, stop - start)
            advance(stop - start)
        advance(self.num_bytes - done)

    def _open_mask(self) -> Table | None:
        path = dataset_file(self.prefix, "mask.bin")
        if not path.exists():
            return None
        file = CheckedFile(path, mapped=True)
        expected = f"{self.num_tokens}, one for each token of the .bin"
        file.expect(file.size == self.num_tokens, "size", f"{file.size} bytes", expected)
        return Table(file, "mask", "u1", 0, self.num_tokens)

    def _check_ends(self) -> None:
        """Both ends of every table and the size of the data, in constant time."""
        n, documents, pointers = self.num_sequences, self._documents, self._pointers
        documents.expect(documents[0] == 0, 0, documents[0], "0")
        last = len(documents) - 1
        documents.expect(documents[last] == n, last, documents[last], f"{n}, the number of sequences")
        end = 0
        if n > 0:
            pointers.expect(pointers[0] == 0, 0, pointers[0], "0")
            self._lengths.expect(self._lengths[n - 1] >= 0, n - 1, self._lengths[n - 1], "0 or more")
            end = pointers[n - 1] + self._lengths[n - 1] * self.dtype.itemsize
        size = self._data.size
        self._data.expect(size == end, "size", f"{size} bytes", f"{end} bytes, where the index ends")
        whole = size % self.dtype.itemsize == 0
        self._data.expect(whole, "size", f"{size} bytes", f"a multiple of {self.dtype.itemsize}")

    def _check_tables(self, advance: Callable[[int], None]) -> None:
        """Every length, pointer and document index, a chunk at a time. That all end inside the data follows."""
        end = 0  # of the sequences so far, in bytes
        for start, stop in _chunks(self.num_sequences):
            lengths, pointers = self._lengths.span(start, stop), self._pointers.span(start, stop)
            self._lengths.expect_all(lengths >= 0, start, lengths, "0 or more")
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            follows = pointers == np.concatenate(([end], ends[:-1]))
            self._pointers.expect_all(follows, start, pointers, "the end of the sequence before")
            end = int(ends[-1])
            advance(12 * (stop - start))
        before = 0
        for start, stop in _chunks(len(self._documents)):
            indices = self._documents.span(start, stop)
            rises = (indices >= np.concatenate(([before], indices[:-1]))) & (indices <= self.num_sequences)
            self._documents.expect_all(rises, start, indices, f"rising, at most {self.num_sequences}")
            before = int(indices[-1])
            advance(8 * (stop - start))

    def _check_tokens(self, vocab_size: int | None, advance: Callable[[int], None]) -> None:
        limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
        expected = "0 or more" if vocab_size is None else f"0 .. {vocab_size - 1}, the ids of the vocabulary"
        for start, stop in _chunks(self.num_tokens):
            ids = self._tokens.span(start, stop)
            if int(ids.min()) < 0 or int(ids.max()) >= limit:
                known = (ids >= 0) & (ids.astype(np.int64) < limit)
                self._tokens.expect_all(known, start, ids, expected)
            advance(ids.nbytes)

    def _read_info(self) -> DatasetInfo | None:
        path = dataset_file(self.prefix, "json")
        try:
            info = DatasetInfo.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "content"
            raise format_error(path, field, repr(first["input"])[:80], first["msg"]) from None
        for field, actual in (("num_tokens", self.num_tokens), ("num_documents", self.num_documents)):
            told = getattr(info, field)
            if told != actual:
                raise format_error(path, field, told, f"{actual} as in the .idx; is it another dataset's file?")
        return info


class IndexedDatasetWriter:
    """Writes a dataset; one sequence a document. Used as a context manager.

    Everything goes to `*.partial` names. Leaving the block syncs and renames, the index last, so an index
    exists only when its data are complete; leaving it by an exception removes all. Four bytes of memory a
    document.

    Args:
        prefix: files are `PREFIX.bin`, `PREFIX.idx` and, with `info`, `PREFIX.json`. Old ones are replaced.
        dtype: an integer type; see `token_dtype`.
        info: goes into `PREFIX.json` with the counts filled in. May be set until the block is left.
        masked: these are fine-tuning data; every document comes with a mask, which goes into `PREFIX.mask.bin`.
    """

    def __init__(
        self, prefix: Path | str, dtype: npt.DTypeLike, info: DatasetInfo | None = None, *, masked: bool = False
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if np.dtype(known) == self.dtype]
        if not codes or self.dtype.kind not in "iu":
            raise ValueError(f"dtype = {self.dtype.name}; the format stores int8 .. int64, uint8 and uint16")
        self._code = codes[0]
        self.info = info
        self._masked = masked
        self.num_tokens = 0
        self._lengths = array("i")

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> "IndexedDatasetWriter":
        with _storage_errors(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._data = self._partial("bin").open("wb", buffering=1 << 20)
            self._mask = self._partial("mask.bin").open("wb", buffering=1 << 20) if self._masked else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _storage_errors(self.prefix):
                    self._commit()
        finally:
            self._discard()

    def add_document(self, tokens: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> None:
        """Append one document; it may be empty."""
        ids = np.asarray(tokens, dtype=None if len(tokens) else self.dtype)  # type: ignore[arg-type]
        self.add_documents(ids, [len(ids)], mask)

    def add_documents(self, flat_ids: npt.ArrayLike, lengths: Iterable[int], mask: npt.ArrayLike | None = None) -> None:
        """Append documents given as their ids one after another, and their mask where the dataset has one.

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
        with _storage_errors(self.prefix):
            self._data.write(np.ascontiguousarray(ids, self.dtype).data)
            if self._mask is not None and targets is not None:
                self._mask.write(targets.astype(np.uint8).data)
        self._lengths.frombytes(counts.astype(np.int32).tobytes())
        self.num_tokens += ids.size

    def _check_ids(self, ids: Array) -> None:
        """Ids that the dtype would silently wrap around are refused."""
        if ids.size == 0:
            return
        low, high, top = int(ids.min()), int(ids.max()), int(np.iinfo(self.dtype).max)
        if low < 0 or high > top:
            raise DataError(
                f"{dataset_file(self.prefix, 'bin')}: token id {low if low < 0 else high} does not fit "
                f"{self.dtype.name} (0 .. {top}); choose the dtype by the tokenizer's vocabulary size"
            )

    def _commit(self) -> None:
        kinds = ["bin"]
        _sync(self._data)
        if self._mask is not None:
            _sync(self._mask)
            kinds.append("mask.bin")
        if self.info is not None:
            counted = {"num_documents": self.num_documents, "num_tokens": self.num_tokens}
            with self._partial("json").open("wb") as file:
                file.write(self.info.model_copy(update=counted).model_dump_json(indent=2).encode() + b"\n")
                _sync(file)
            kinds.append("json")
        with self._partial("idx").open("wb") as file:
            self._write_index(file)
            _sync(file)
        for kind in ("idx", "json", "mask.bin"):  # an index must never stand beside data that are not its own
            dataset_file(self.prefix, kind).unlink(missing_ok=True)
        for kind in (*kinds, "idx"):
            os.replace(self._partial(kind), dataset_file(self.prefix, kind))
        _sync_directory(self.prefix.parent)

    def _write_index(self, file: BinaryIO) -> None:
        n = len(self._lengths)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if n else np.empty(0, np.int32)
        file.write(HEADER.pack(MAGIC, VERSION, self._code, n, n + 1))
        file.write(lengths.astype("<i4", copy=False).data)
        end = 0
        for start, stop in _chunks(n):
            ends = end + np.cumsum(lengths[start:stop], dtype=np.int64) * self.dtype.itemsize
            file.write(np.concatenate(([end], ends[:-1])).astype("<i8").data)
            end = int(ends[-1])
        for start, stop in _chunks(n + 1):
            file.write(np.arange(start, stop, dtype="<i8").data)

    def _discard(self) -> None:
        """Remove what is still partial; after a commit nothing is."""
        for file in (self._data, self._mask):
            with suppress(OSError):
                if file is not None:
                    file.close()
        for kind in ("bin", "mask.bin", "json", "idx"):
            with suppress(OSError):
                self._partial(kind).unlink(missing_ok=True)

    def _partial(self, kind: str) -> Path:
        return Path(f"{dataset_file(self.prefix, kind)}.partial")


def _read_header(index: CheckedFile) -> tuple[np.dtype[Any], int, int]:
    """Token type, sequence count n and document count d; counts are held against the size before any use."""
    index.expect(index.size >= HEADER.size, "size", f"{index.size} bytes", f"at least {HEADER.size}, a header")
    magic, version, code, n, d = HEADER.unpack(index.read(0, HEADER.size))
    index.expect(magic == MAGIC, "magic", magic, repr(MAGIC))
    index.expect(version == VERSION, "version", version, str(VERSION))
    index.expect(code in DTYPES, "dtype code", code, "1 .. 5 or 8")
    dtype = np.dtype(DTYPES[code])
    index.expect(dtype.kind in "iu", "dtype", dtype.name, "an integer type, as token ids are whole numbers")
    index.expect(d >= 1, "document count", d, "1 or more, as the table ends with the sequence count")
    size = HEADER.size + 12 * n + 8 * d
    expected = f"{size} ({size + n} with modes) for {n} sequences and {d} document indices"
    index.expect(index.size in (size, size + n), "size", f"{index.size} bytes", expected)
    return dtype, n, d


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Makes renames inside it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(prefix: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"cannot write the dataset {prefix}: {reason}; free space or choose another prefix"
        ) from error

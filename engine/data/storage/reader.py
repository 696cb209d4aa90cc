"""Reads token datasets without trusting the files.

Opening a dataset checks the header, the sizes and both ends of every table. Small tables are checked completely at
opening, large ones entry by entry on access, and completely by `verify`. A dataset of 10^12 tokens therefore opens in
milliseconds, and damage raises a `DataFormatError`. Alternative considered: trusting the index, as other readers of
this format do; with a truncated copy, a run then trains on garbage or fails days later.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from engine.data.storage.files import Array, CheckedFile, Ints, Table
from engine.data.storage.format import HEADER, chunks, dataset_file, read_header
from engine.data.storage.info import read_info

CHECKED_AT_OPENING = 1 << 20  # entries; tables up to this size are completely checked at opening
OnVerified = Callable[[int, int], None]  # (bytes verified, total bytes)


class IndexedDataset:
    """A dataset opened for reading. Offsets are in tokens from the start of the `.bin`.

    Unpickling (in a worker process) reopens the files by name.

    Raises:
        DataError: a file is missing.
        DataFormatError: a file is damaged. Later reads raise it if they find damage.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._index = CheckedFile(dataset_file(prefix, "idx"))
        self._data = CheckedFile(dataset_file(prefix, "bin"), mapped=True)
        self.dtype, self.num_sequences, document_indices = read_header(self._index)
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
        self.info = read_info(self.prefix, self.num_tokens, self.num_documents)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[Path]]:
        return IndexedDataset, (self.prefix,)

    @property
    def num_bytes(self) -> int:
        """Total size of all files except the description."""
        return self._index.size + self._data.size + (len(self._mask) if self._mask else 0)

    @property
    def has_mask(self) -> bool:
        """Whether this is a fine-tuning dataset, with a target mask."""
        return self._mask is not None

    def mask(self, start: int, count: int) -> Array:
        """Return the target mask of the tokens `[start, start + count)`: uint8, read-only, 0 or 1.

        Raises:
            DataFormatError: an entry is neither 0 nor 1.
        """
        assert self._mask is not None, "only fine-tuning datasets have a mask"
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens} in {self.prefix}")
        self._mask.file.check_size()
        values = self._mask.span(start, start + count)
        self._mask.expect_all(values <= 1, start, values, "0 or 1")
        return values

    def tokens(self, start: int, count: int) -> Array:
        """Return the tokens `[start, start + count)`: read-only, in the stored dtype."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens} in {self.prefix}")
        self._data.check_size()
        return self._tokens.span(start, start + count)

    def document_start(self, j: int) -> int:
        """Return the token offset of document `j`; `num_tokens` for `j = num_documents`."""
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
        """Return the increasing token offsets at which documents start in `(start, stop)`, both exclusive."""
        j = bisect_right(range(self.num_documents), start, key=self.document_start)
        starts = [start]
        while j < self.num_documents and (offset := self.document_start(j)) < stop:
            self._documents.expect(offset >= starts[-1], j, offset, f"a token from {starts[-1]} on")
            if offset > starts[-1]:  # an empty document starts at the same offset as the next one
                starts.append(offset)
            j += 1
        return np.array(starts[1:], np.int64)

    def document_at(self, offset: int) -> int:
        """Return the number of the document that contains token `offset`."""
        if not 0 <= offset < self.num_tokens:
            raise IndexError(f"token {offset} of {self.num_tokens} in {self.prefix}")
        return bisect_right(range(self.num_documents), offset, key=self.document_start) - 1

    def document_lengths(self) -> Iterator[Ints]:
        """Yield the lengths of all documents in tokens, in order, a chunk at a time."""
        for start, stop in chunks(self.num_documents):
            sequences = self._documents.span(start, stop + 1)
            sound = (sequences >= 0) & (sequences <= self.num_sequences)
            sound[1:] &= sequences[1:] >= sequences[:-1]
            self._documents.expect_all(sound, start, sequences, f"rising, at most {self.num_sequences}")
            inner = sequences[sequences < self.num_sequences]
            starts = np.full(sequences.size, self.num_tokens, np.int64)
            starts[: inner.size] = self._pointers.gather(inner) // self.dtype.itemsize
            yield np.diff(starts)

    def verify(self, vocab_size: int | None, on_progress: OnVerified | None = None) -> None:
        """Check every entry of the index and every token id (against `vocab_size` if given).

        Raises:
            DataFormatError: with the first invalid entry.
        """
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if on_progress is not None:
                on_progress(done, self.num_bytes)

        self._check_tables(advance)
        self._check_tokens(vocab_size, advance)
        for start, stop in chunks(len(self._mask) if self._mask else 0):
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
        """Check both ends of every table and the size of the data, in constant time."""
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
        """Check every length, pointer and document index, a chunk at a time."""
        end = 0  # byte offset after the sequences so far
        for start, stop in chunks(self.num_sequences):
            lengths, pointers = self._lengths.span(start, stop), self._pointers.span(start, stop)
            self._lengths.expect_all(lengths >= 0, start, lengths, "0 or more")
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            follows = pointers == np.concatenate(([end], ends[:-1]))
            self._pointers.expect_all(follows, start, pointers, "the end of the sequence before")
            end = int(ends[-1])
            advance(12 * (stop - start))
        before = 0
        for start, stop in chunks(len(self._documents)):
            indices = self._documents.span(start, stop)
            rises = (indices >= np.concatenate(([before], indices[:-1]))) & (indices <= self.num_sequences)
            self._documents.expect_all(rises, start, indices, f"rising, at most {self.num_sequences}")
            before = int(indices[-1])
            advance(8 * (stop - start))

    def _check_tokens(self, vocab_size: int | None, advance: Callable[[int], None]) -> None:
        limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
        expected = "0 or more" if vocab_size is None else f"0 .. {vocab_size - 1}, the ids of the vocabulary"
        for start, stop in chunks(self.num_tokens):
            ids = self._tokens.span(start, stop)
            if int(ids.min()) < 0 or int(ids.max()) >= limit:
                known = (ids >= 0) & (ids.astype(np.int64) < limit)
                self._tokens.expect_all(known, start, ids, expected)
            advance(ids.nbytes)

"""Reads token datasets without trusting the files.

Opening a dataset checks the header, the sizes and both ends of every table. Small tables are checked completely at
opening, large ones entry by entry on access, and completely by `verify` and before their first complete read. A dataset
of 10^12 tokens therefore opens in milliseconds, and damage raises a `DataFormatError`. Changes that leave a valid
dataset are found by its checksums: all by `verify`, those in a few samples by `verify_spans`. Alternative considered:
trusting the index, as other readers of this format do; with a truncated copy, a run then trains on garbage or fails
days later.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from engine.data.storage.checksums import (
    SEALED_BLOCK,
    Checksums,
    FileChecksums,
    hash_blocks,
    num_blocks,
    read_checksums,
)
from engine.data.storage.files import Array, CheckedFile, Ints, Table
from engine.data.storage.format import HEADER, chunks, dataset_file, read_header
from engine.data.storage.info import read_info

CHECKED_AT_OPENING = 1 << 20  # entries; tables up to this size are completely checked at opening
IDENTITY_TOKENS = 4096  # hashed at each end of a dataset
_FOLLOWS = "the end of the sequence before"
OnVerified = Callable[[int, int], None]  # (bytes verified, total bytes)


class IndexedDataset:
    """A dataset opened for reading. Offsets are in tokens from the start of the `.bin`.

    Unpickling (in a worker process) reopens the files by name.

    Args:
        prefix: of the files.
        vocab_size: reading a token whose id is not below it is an error; None: no limit.
        sealed: False ignores the checksums, to seal the dataset again.

    Attributes:
        checksums: None if the dataset has none.

    Raises:
        DataError: a file is missing.
        DataFormatError: a file is damaged. Later reads raise it if they find damage.
    """

    def __init__(self, prefix: Path | str, vocab_size: int | None = None, *, sealed: bool = True) -> None:
        self.prefix, self._vocab_size, self._sealed = Path(prefix), vocab_size, sealed
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
        self.checksums = read_checksums(self.prefix) if sealed else None
        self._tables_checked = False
        if n + document_indices <= CHECKED_AT_OPENING:
            self._check_tables()
        self.info = read_info(self.prefix, self.num_tokens, self.num_documents)

    def __reduce__(self) -> tuple[Callable[..., "IndexedDataset"], tuple[Path, int | None]]:
        return IndexedDataset, (self.prefix, self._vocab_size)

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
        ids = self._tokens.span(start, start + count)
        if self._vocab_size is not None:
            self.check_ids(start, ids, self._vocab_size)
        return ids

    def check_ids(self, start: int, ids: Array, vocab_size: int | None) -> None:
        """Check `ids`, the tokens from `start` on, against a vocabulary; without one, that they are not negative.

        Raises:
            DataFormatError: names the first other id, its document and its place there.
        """
        if not ids.size or (int(ids.min()) >= 0 and (vocab_size is None or int(ids.max()) < vocab_size)):
            return
        limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
        at = int(((ids < 0) | (ids.astype(np.int64) >= limit)).argmax())
        document = self.document_at(start + at)
        known = "0 or more" if vocab_size is None else f"0 .. {vocab_size - 1}, the ids of the vocabulary"
        place = f"token {start + at - self._offset(document)} of document {document}"
        expected = f"{known} (it is {place}); was the dataset made with another tokenizer?"
        self._tokens.expect(False, start + at, int(ids[at]), expected)

    def document_start(self, j: int) -> int:
        """Return the token offset of document `j`; `num_tokens` for `j = num_documents`."""
        if not 0 <= j <= self.num_documents:
            raise IndexError(f"document {j} of {self.num_documents} in {self.prefix}")
        sequence = self._documents[j]
        if sequence == self.num_sequences:
            return self.num_tokens
        offset = self._offset(j)
        if sequence > 0 and not self._tables_checked:
            end = self._pointers[sequence - 1] + self._lengths[sequence - 1] * self.dtype.itemsize
            follows = offset * self.dtype.itemsize == end
            self._pointers.expect(follows, sequence, self._pointers[sequence], _FOLLOWS)
        return offset

    def _offset(self, j: int) -> int:
        """`document_start` that does not look at the sequence before, for searches."""
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
        j = bisect_right(range(self.num_documents), start, key=self._offset)
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
        return bisect_right(range(self.num_documents), offset, key=self._offset) - 1

    def document_lengths(self) -> Iterator[Ints]:
        """Yield the lengths of all documents in tokens, in order, a chunk at a time."""
        if not self._tables_checked:
            self._check_tables()
        for start, stop in chunks(self.num_documents):
            sequences = self._documents.span(start, stop + 1)
            inner = sequences[sequences < self.num_sequences]
            starts = np.full(sequences.size, self.num_tokens, np.int64)
            starts[: inner.size] = self._pointers.gather(inner) // self.dtype.itemsize
            yield np.diff(starts)

    def identity(self) -> list[str]:
        """Return what tells these data from others of the same name: a hash of the counts and of the tokens at both
        ends, then, if there are checksums, a hash of them, which covers all.
        """
        count = min(IDENTITY_TOKENS, self.num_tokens)
        ends = [self.tokens(start, count).astype("<i8").tobytes() for start in (0, self.num_tokens - count)]
        counts = f"{self.num_tokens} {self.num_documents} {self.num_sequences} {self.has_mask}".encode()
        coarse = hashlib.blake2b(b"".join([counts, *ends]), digest_size=16).hexdigest()
        return [coarse] if self.checksums is None else [coarse, self.checksums.identity()]

    def verify(self, vocab_size: int | None, on_progress: OnVerified | None = None) -> Checksums:
        """Check every entry of the index and the mask, every token id (against `vocab_size` if given) and, if there are
        checksums, every block. Return the checksums of the files as they are.

        Raises:
            DataFormatError: with the first invalid entry, or a changed block.
        """
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if on_progress is not None:
                on_progress(done, self.num_bytes)

        if self.checksums is not None:
            self.checksums.check_sizes()
        self._check_tables(advance)
        found = {}
        for kind, file in self._files().items():
            hashes = array("Q")
            for size, hashed in hash_blocks(file, range(num_blocks(file.size)), self._block_check(kind, vocab_size)):
                hashes.append(hashed)
                advance(size if kind in ("bin", "mask.bin") else 0)
            found[kind] = FileChecksums(file.size, np.array(hashes, np.uint64))
        advance(self.num_bytes - done)
        return Checksums(self.prefix, found)

    def verify_spans(self, spans: Iterable[tuple[int, int]]) -> None:
        """Check the blocks with the tokens `(start, count)`, their masks and the borders of their documents; nothing
        without checksums.

        Raises:
            DataFormatError: a block has changed.
        """
        if self.checksums is None:
            return
        ranges = [("json", 0, 1)]
        for start, count in spans:
            size = self.dtype.itemsize
            ranges += [("bin", start * size, (start + count) * size), ("mask.bin", start, start + count)]
            first, last = self.document_at(start), self.document_at(start + count - 1) + 1
            sequences = self._documents[first], min(self._documents[last], self.num_sequences - 1)
            tables = (self._documents, first, last), (self._pointers, *sequences), (self._lengths, *sequences)
            ranges += [("idx", *table.byte_range(begin, end + 1)) for table, begin, end in tables]
        for kind, file in self._files().items():
            touched = ((begin, end) for of, begin, end in ranges if of == kind)
            blocks = {block for begin, end in touched for block in range(begin // SEALED_BLOCK, num_blocks(end))}
            for _ in hash_blocks(file, sorted(blocks), self._block_check(kind, None)):
                pass

    def _files(self) -> dict[str, CheckedFile]:
        """Return the open files by kind."""
        files = {"idx": self._index, "bin": self._data}
        if self._mask is not None:
            files["mask.bin"] = self._mask.file
        if self.info is not None:
            files["json"] = CheckedFile(dataset_file(self.prefix, "json"))
        return files

    def _block_check(self, kind: str, vocab_size: int | None) -> Callable[[int, bytes, int], None]:
        """Return a function that checks number, content and hash of a block of a file."""

        def check(block: int, content: bytes, hashed: int) -> None:
            start = block * SEALED_BLOCK
            if kind == "bin":
                self.check_ids(start // self.dtype.itemsize, np.frombuffer(content, self.dtype), vocab_size)
            if self._mask is not None and kind == "mask.bin":
                values = np.frombuffer(content, np.uint8)
                self._mask.expect_all(values <= 1, start, values, "0 or 1")
            if self.checksums is not None:
                self.checksums.check(kind, block, hashed)

        return check

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

    def _check_tables(self, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Check every length, pointer and document index, a chunk at a time."""
        end = 0  # byte offset after the sequences so far
        for start, stop in chunks(self.num_sequences):
            lengths, pointers = self._lengths.span(start, stop), self._pointers.span(start, stop)
            self._lengths.expect_all(lengths >= 0, start, lengths, "0 or more")
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            follows = pointers == np.concatenate(([end], ends[:-1]))
            self._pointers.expect_all(follows, start, pointers, _FOLLOWS)
            end = int(ends[-1])
            advance(12 * (stop - start))
        before = 0
        for start, stop in chunks(len(self._documents)):
            indices = self._documents.span(start, stop)
            rises = (indices >= np.concatenate(([before], indices[:-1]))) & (indices <= self.num_sequences)
            self._documents.expect_all(rises, start, indices, f"rising, at most {self.num_sequences}")
            before = int(indices[-1])
            advance(8 * (stop - start))
        self._tables_checked = True

"""Fine-tuning samples: rows of whole conversations; row i is a pure function of its number.

A conversation of n tokens gives n − 1 pairs of a token and the next token. Packing (see `packing.py`) determines which
lengths share a row; keyed permutations, new in every epoch, determine the conversation at each place and the order of
the rows. Every epoch therefore reads every conversation `weight` times, none is split, and resuming needs only a
number. Alternative considered: packing on the fly, which depends on the number of readers and fills rows less.

Legend: S tokens in a row.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.config.schema import DatasetConfig
from engine.data.samples.packing import Packing, best_fit, one_per_row
from engine.data.samples.permutation import Permutation
from engine.data.samples.sample import SPLITS, Sample, Split, part_documents
from engine.data.storage.files import Ints
from engine.data.storage.reader import IndexedDataset
from engine.errors import ConfigError, DataError

MAX_WEIGHT = 1000  # maximum number of reads of a conversation per epoch
SEGMENT = 64  # padding attends to itself in segments of this size, at almost no cost


class SftDataset:
    """Rows of conversations, epoch after epoch.

    Args:
        datasets: prefixes of datasets with masks; the weight is the number of times an epoch reads each conversation.
        split: relative sizes of train, valid and test; conversations are assigned at random, independent of `seed`.
        part: the split to read.
        seq_length: S.
        seed: seed of the order.
        packed: pack several conversations into a row if they fit.
        epochs: rows after this many epochs are empty; None: endless.
        vocab_size: reading an id that is not below it is a DataFormatError; None: no limit.

    Attributes:
        packing: the contents of an epoch's `num_rows` rows with `num_conversations` conversations.
        mean_length: tokens of the conversation that a token belongs to, averaged over all tokens.

    Raises:
        DataError: a file is missing or damaged, has no mask, or a conversation is longer than S + 1 tokens.
        ConfigError: weights that are not whole numbers.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        split: tuple[float, float, float],
        part: Split,
        seq_length: int,
        seed: int,
        *,
        packed: bool = True,
        epochs: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.seq_length, self._seed, self._epochs = seq_length, seed, epochs
        self._sources = list(_open(datasets, split, part, seq_length, vocab_size))
        self._weights = [dataset.weight for dataset in datasets]
        owners = [np.full(source.conversations.size, at) for at, source in enumerate(self._sources)]
        lengths = np.concatenate([source.lengths for source in self._sources])
        self.num_conversations = lengths.size
        if not lengths.size:
            names = ", ".join(str(dataset.path) for dataset in datasets)
            raise DataError(
                f"{names}: no conversation for the {part} part of data.split = {list(split)}; give it a share, or name "
                "data.valid; to train without evaluations: data.split = [1, 0, 0], train.eval_steps = 0, "
                "train.early_stopping = 0, checkpoint.keep_best = false"
            )
        self.packing = (best_fit if packed else one_per_row)(lengths, seq_length)
        self.num_rows = self.packing.num_rows
        pairs = lengths.astype(np.float64)
        self.mean_length = float((pairs**2).sum() / pairs.sum())
        order = np.argsort(lengths, kind="stable")
        self._owners = np.concatenate(owners)[order].astype(np.int32)
        self._conversations = np.concatenate([source.conversations for source in self._sources])[order]
        self._places = _Places(self.packing, lengths)

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        return tuple(source.data for source in self._sources)

    @property
    def num_tokens(self) -> int:
        """The tokens of an epoch without padding, over all datasets."""
        return round(self.efficiency * self.num_rows * self.seq_length)

    @property
    def efficiency(self) -> float:
        """The fraction of the rows' tokens that are not padding."""
        return self.packing.efficiency

    def passes(self, num_samples: int) -> list[float]:
        """Return how often the first `num_samples` rows read each dataset."""
        passes = num_samples / self.num_rows
        epochs = passes if self._epochs is None else min(passes, self._epochs)
        return [epochs * weight for weight in self._weights]

    def summary(self) -> str:
        """Return a line with the number of conversations and sequences, and how full these are."""
        rows = f"{self.num_conversations:,} conversations in {self.num_rows:,} sequences"
        return f"{rows}, {self.efficiency:.1%} full"

    def sample(self, i: int) -> Sample:
        """Return row `i >= 0`, padded with token 0, which is not a target."""
        tokens, labels = np.zeros((2, self.seq_length), np.int64)
        target_mask, boundaries = np.zeros(self.seq_length, bool), []
        end = 0
        for data, start, count in self.spans(i):
            ids = data.tokens(start, count)
            place = slice(end, end + ids.size - 1)
            tokens[place], labels[place] = ids[:-1], ids[1:]
            target_mask[place] = data.mask(start, count)[1:]
            end = place.stop
            boundaries.append(end)
        boundaries += range(end + SEGMENT, self.seq_length, SEGMENT)
        return Sample(tokens, labels, np.array([b for b in boundaries if b < self.seq_length], np.int64), target_mask)

    def spans(self, i: int) -> list[tuple[IndexedDataset, int, int]]:
        """Return the tokens that row `i` reads."""
        found = []
        for source, conversation in self.conversations(i):
            data = self._sources[source].data
            start, stop = data.document_start(conversation), data.document_start(conversation + 1)
            found.append((data, start, stop - start))
        return found

    def conversations(self, i: int) -> list[tuple[int, int]]:
        """Return the contents of row `i` as (dataset, conversation) pairs; empty after the last epoch."""
        if i < 0:
            raise IndexError(f"row {i}; rows count from 0")
        epoch, row = divmod(i, self.num_rows)
        if self._epochs is not None and epoch >= self._epochs:
            return []
        row = Permutation(self.num_rows, self._seed, "rows", epoch)(row)
        found = []
        for length, first, count, place in self._places.of_row(row):
            order = Permutation(count, self._seed, "conversations", epoch, length)
            found.append(first + order(place))
        return [(int(self._owners[at]), int(self._conversations[at])) for at in found]

    def fingerprint(self) -> str:
        """Return a hash of the data and their order, independent of their directory."""
        content = [self._seed, self.seq_length, [source.identity() for source in self._sources], self.num_rows]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Source:
    """One split of a dataset.

    Attributes:
        conversations: numbers of the conversations, each repeated as often as an epoch reads it.
        lengths: number of (token, next token) pairs of each.
    """

    data: IndexedDataset
    name: str
    conversations: Ints
    lengths: Ints

    def identity(self) -> list[object]:
        chosen = hashlib.blake2b(digest_size=16)
        for array in (self.conversations, self.lengths):
            chosen.update(array.astype("<i8").tobytes())
        return [self.name, self.data.num_documents, self.data.num_tokens, chosen.hexdigest()]


class _Places:
    """The places of each length in the rows of a packing.

    Items of one length are numbered through all rows, in the order of patterns and of rows within a pattern.
    """

    def __init__(self, packing: Packing, lengths: Ints) -> None:
        self._patterns = packing.patterns
        self._ends = np.cumsum(packing.counts)
        sizes, counts = np.unique(lengths, return_counts=True)
        firsts = np.cumsum(counts) - counts  # index of the first item of each length, among all items sorted by length
        self._group = {s: (f, c) for s, f, c in zip(sizes.tolist(), firsts.tolist(), counts.tolist(), strict=True)}
        self._before: list[
            list[int]
        ] = []  # for each pattern and each of its lengths: items of that length in earlier patterns
        seen: Counter[int] = Counter()
        for pattern, rows in zip(packing.patterns, packing.counts, strict=True):
            self._before.append([seen[length] for length, _ in pattern])
            seen.update({length: many * rows for length, many in pattern})

    def of_row(self, row: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield for each item its length, the first item of that length, their count, and its number among them."""
        at = int(np.searchsorted(self._ends, row, side="right"))
        within = row - (int(self._ends[at - 1]) if at else 0)
        for (length, many), before in zip(self._patterns[at], self._before[at], strict=True):
            for place in range(before + within * many, before + (within + 1) * many):
                yield length, *self._group[length], place


def _open(
    datasets: Sequence[DatasetConfig],
    split: tuple[float, float, float],
    part: Split,
    seq_length: int,
    vocab_size: int | None,
) -> Iterator[_Source]:
    seen: Counter[str] = Counter()
    for dataset in datasets:
        data, name = IndexedDataset(dataset.path, vocab_size), dataset.path.name
        if not data.has_mask:
            raise DataError(
                f"{dataset.path} has no .mask.bin, which marks the target tokens; "
                "preprocess conversations with task = sft (triaxis preprocess), or train with task = pretrain"
            )
        if dataset.weight not in range(1, MAX_WEIGHT + 1):
            raise ConfigError(
                f"{dataset.path}: weight = {dataset.weight}; fine-tuning reads every conversation weight times an "
                f"epoch, so expected a whole number up to {MAX_WEIGHT}"
            )
        chosen = _deal(data.num_documents, (name, seen[name]), split, part)
        lengths = np.concatenate([np.empty(0, np.int64), *data.document_lengths()])[chosen]
        if lengths.size and (longest := int(lengths.max())) > seq_length + 1:
            raise DataError(
                f"{dataset.path}: conversation {chosen[lengths.argmax()]} has {longest:,} tokens, too many for "
                f"data.seq_length = {seq_length}; raise that to {longest - 1} or more, or preprocess again with "
                f"max_length = {seq_length + 1} and an on_too_long of your choice"
            )
        chosen = np.repeat(chosen[lengths > 1], int(dataset.weight))
        yield _Source(data, f"{name}/{seen[name]}", chosen, np.repeat(lengths[lengths > 1], int(dataset.weight)) - 1)
        seen[name] += 1


def _deal(count: int, key: tuple[str, int], split: tuple[float, float, float], part: Split) -> Ints:
    """Return the conversations of a split, in file order."""
    cuts = [0, *(part_documents(count, split, each)[1] for each in SPLITS)]
    for k in (2, 1):  # a nonzero share gets at least one conversation
        cuts[k] = max(min(1, count), min(cuts[k], cuts[k + 1] - (split[k] > 0)))
    begin, end = cuts[SPLITS.index(part)], cuts[SPLITS.index(part) + 1]
    if end - begin == count:
        return np.arange(count)
    return np.sort(Permutation(count, "split", *key).many(np.arange(begin, end)).astype(np.int64))

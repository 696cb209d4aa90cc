"""Pretraining samples; sample i is a pure function of its number.

`sample(i)` computes dataset, epoch, location and document boundaries by arithmetic and a binary search in the document
table. Resuming therefore needs one integer, and the samples do not depend on the layout, the number of workers,
restarts, or the length of the run. Alternative considered: sample indices that are built before the first step and
shared through a file or a broadcast.

The order is keyed by the last component of a dataset's path, so a directory of datasets can be moved; datasets of a
mixture with the same name are distinguished by a number.

Legend: S sequence length.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config.schema import DatasetConfig
from engine.data.samples.mixture import SAMPLES_PER_BLOCK, Mixture
from engine.data.samples.permutation import Permutation, keyed_below
from engine.data.samples.sample import Location, Sample, Split, part_documents
from engine.data.storage.reader import IDENTITY_TOKENS, IndexedDataset
from engine.errors import DataError
from engine.formatting import counted


class PretrainDataset:
    """An endless sequence of samples drawn from weighted datasets.

    Args:
        datasets: prefixes and weights of the datasets.
        split: relative sizes of train, valid and test; each dataset is split into contiguous ranges of documents.
        part: the split to read.
        seq_length: S; a sample reads S + 1 tokens.
        seed: seed of the order.
        vocab_size: reading an id that is not below it is a DataFormatError; None: no limit.

    Attributes:
        num_rows, efficiency, mean_length: see `SampleDataset`; samples are endless and have no padding.

    Raises:
        DataError: a file is missing or damaged, or a dataset has too few tokens for one sample.
        ConfigError: invalid splits or weights.
    """

    num_rows = None
    efficiency = 1.0
    mean_length = None

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        split: tuple[float, float, float],
        part: Split,
        seq_length: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        self.seq_length = seq_length
        self._mixture = Mixture([dataset.weight for dataset in datasets])
        self._sources: list[_Source] = []
        seen: Counter[str] = Counter()
        for dataset in datasets:
            data, name = IndexedDataset(dataset.path, vocab_size), dataset.path.name
            begin, end = part_tokens(data, split, part)
            samples = (end - begin - seq_length) // seq_length
            if samples < 1:
                raise DataError(
                    f"{dataset.path}: the {part} part has {end - begin:,} tokens and needs {2 * seq_length:,} for "
                    f"data.seq_length = {seq_length}; {_advice(data, split, part)}"
                )
            self._sources.append(_Source(data, name, seen[name], begin, end, samples, seq_length, seed))
            seen[name] += 1

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        return tuple(source.data for source in self._sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, over all datasets."""
        return sum(source.end - source.begin for source in self._sources)

    def sample(self, i: int) -> Sample:
        """Return sample `i >= 0`; epochs follow each other without end."""
        here, length = self.where(i), self.seq_length
        data = self._sources[here.dataset].data
        tokens = data.tokens(here.start, length + 1).astype(np.int64)
        boundaries = data.document_starts_in(here.start, here.start + length) - here.start
        return Sample.following(tokens, boundaries)

    def spans(self, i: int) -> list[tuple[IndexedDataset, int, int]]:
        """Return the tokens that sample `i` reads."""
        here = self.where(i)
        return [(self.datasets[here.dataset], here.start, self.seq_length + 1)]

    def where(self, i: int) -> Location:
        """Return the location of sample `i`, without reading it."""
        if i < 0:
            raise IndexError(f"sample {i}; samples count from 0")
        dataset, draw = self._mixture.draw(i)
        source = self._sources[dataset]
        return Location(dataset, source.name, *source.locate(draw))

    def fingerprint(self) -> str:
        """Return a hash of the data and their order, independent of their directory.

        Covers seed, split, mixture, sizes and the first and last tokens of each dataset's split.
        """
        content = [self._mixture.counts, [source.identity() for source in self._sources]]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def passes(self, num_samples: int) -> list[float]:
        """Return how often the first `num_samples` samples read each dataset."""
        shares = (count / SAMPLES_PER_BLOCK for count in self._mixture.counts)
        return [num_samples * share / source.num_samples for share, source in zip(shares, self._sources, strict=True)]

    def summary(self) -> None:
        """Return None: pretraining samples are not packed."""


def part_tokens(data: IndexedDataset, split: Sequence[float], part: Split) -> tuple[int, int]:
    """Return the tokens [begin, end) of one split, which consists of whole documents."""
    begin, end = map(data.document_start, part_documents(data.num_documents, split, part))
    return begin, end


def _advice(data: IndexedDataset, split: Sequence[float], part: Split) -> str:
    """Return what to do about a part that is too small for one sample."""
    begin, end = part_documents(data.num_documents, split, part)
    documents = counted(data.num_documents, "document")
    if begin == end and data.num_documents:
        return (
            f"the split is by document, and the data have {documents}: cut the text into more documents, or train "
            "without validation: --data.split '[1, 0, 0]' --train.eval_steps 0"
        )
    return (
        f"add text, shorten the sequence, or change data.split = {list(split)} ({documents}, "
        f"{data.num_tokens:,} tokens in all)"
    )


@dataclass(frozen=True)
class _Source:
    """Tokens [begin, end) of one dataset, read in epochs of `num_samples` samples."""

    data: IndexedDataset
    name: str
    occurrence: int  # number of earlier datasets with this name in the mixture
    begin: int
    end: int
    num_samples: int
    seq_length: int
    seed: int

    def locate(self, draw: int) -> tuple[int, int, int]:
        """Return epoch, number in file order and first token of a draw. Sample boundaries shift every epoch."""
        epoch, i = divmod(draw, self.num_samples)
        key = (self.seed, self.name, self.occurrence, epoch)
        number = Permutation(self.num_samples, *key)(i)
        offset = keyed_below(self.seq_length, "offset", *key)
        return epoch, number, self.begin + offset + number * self.seq_length

    def identity(self) -> list[Any]:
        count = min(IDENTITY_TOKENS, self.end - self.begin)
        ends = [self.data.tokens(start, count).astype("<i8").tobytes() for start in (self.begin, self.end - count)]
        content = hashlib.blake2b(b"".join(ends), digest_size=16).hexdigest()
        numbers = [self.occurrence, self.begin, self.end, self.num_samples, self.seq_length, self.seed]
        return [self.name, *numbers, content]

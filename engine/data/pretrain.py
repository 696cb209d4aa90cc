"""Pretraining samples: sample i is a pure function of its number.

`sample(i)` computes dataset, epoch, place and document boundaries by arithmetic and a binary search in the mapped
document table. So resuming is one integer, and the samples depend on neither the layout, the number of workers,
a restart, nor how long the run is to be. Rejected: sample indices built before the first step and shared by a
file or a broadcast.

The order is keyed by the last part of a dataset's path, so that moving a directory of datasets changes nothing;
where two datasets of a mixture share that name, the later ones are told apart by a number.

Legend: T tokens of a dataset's part, S sequence length.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.config import DatasetConfig
from engine.data.files import Array, Ints
from engine.data.indexed import IndexedDataset
from engine.data.mixture import Mixture, Permutation, keyed_below
from engine.errors import ConfigError, DataError

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
PROBES = 64  # places of a dataset at which its token ids are checked at start
PROBE_TOKENS = 4096


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes:
        tokens: int64 [S].
        labels: int64 [S], what follows each of them.
        boundaries: offsets in (0, S) at which a document starts.
        learned: bool [S], which labels count; None: all.
    """

    tokens: Ints
    labels: Ints
    boundaries: Ints
    learned: npt.NDArray[np.bool_] | None = None

    @classmethod
    def following(cls, tokens: Ints, boundaries: Ints) -> "Sample":
        """Of consecutive tokens [S + 1], of which the last is only a label."""
        return cls(tokens[:-1], tokens[1:], boundaries)


@dataclass(frozen=True)
class Location:
    """Where a sample lies: sample `number` of an epoch of a dataset, from token `start` of its `.bin` on."""

    dataset: int
    name: str
    epoch: int
    number: int
    start: int


class PretrainDataset:
    """An endless, ordered set of samples drawn from weighted datasets.

    Args:
        datasets: prefixes and weights.
        split: shares of train, valid and test; each dataset is cut by contiguous documents.
        part: which of the three to read.
        seq_length: S; a sample holds S + 1 tokens.
        seed: of the order.

    Raises:
        DataError: a file is missing or damaged, or a dataset has too few tokens for one sample.
        ConfigError: shares or weights that make no sense.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        split: tuple[float, float, float],
        part: Part,
        seq_length: int,
        seed: int,
    ) -> None:
        self.seq_length = seq_length
        self._mixture = Mixture([dataset.weight for dataset in datasets])
        self._sources: list[_Source] = []
        seen: Counter[str] = Counter()
        for dataset in datasets:
            data, name = IndexedDataset(dataset.path), dataset.path.name
            begin, end = part_range(data, split, part)
            samples = (end - begin - seq_length) // seq_length
            if samples < 1:
                raise DataError(
                    f"{dataset.path}: the {part} part has {end - begin:,} tokens and needs {2 * seq_length:,} for "
                    f"data.seq_length = {seq_length}; add text, shorten the sequence, or change "
                    f"data.split = {list(split)} ({data.num_documents:,} documents, {data.num_tokens:,} tokens in all)"
                )
            self._sources.append(_Source(data, name, seen[name], begin, end, samples, seq_length, seed))
            seen[name] += 1

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        return tuple(source.data for source in self._sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of the part, over all datasets."""
        return sum(source.end - source.begin for source in self._sources)

    def sample(self, i: int) -> Sample:
        """Sample `i >= 0`; there is no last one, as epochs follow one another."""
        here, length = self.where(i), self.seq_length
        data = self._sources[here.dataset].data
        tokens = data.tokens(here.start, length + 1).astype(np.int64)
        boundaries = data.document_starts_in(here.start, here.start + length) - here.start
        return Sample.following(tokens, boundaries)

    def where(self, i: int) -> Location:
        """Where sample `i` lies, without reading it."""
        if i < 0:
            raise IndexError(f"sample {i}; samples count from 0")
        dataset, draw = self._mixture.draw(i)
        source = self._sources[dataset]
        return Location(dataset, source.name, *source.locate(draw))

    def fingerprint(self) -> str:
        """Identifies the data and their order; independent of the directory they lie in.

        Covers seed, split, mixture, sizes and the first and last tokens of each dataset's part.
        """
        content = [self._mixture.counts, [source.identity() for source in self._sources]]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at token ids all over each dataset (some quarter of a million), so that a run with the wrong
        tokenizer ends before its first step. `tools/inspect_data.py --verify` looks at every one.

        Raises:
            DataError: an id is not below `vocab_size`.
        """
        for source in self._sources:
            _check_recorded(source.data, vocab_size)
            for start, ids in source.probes():
                wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
                if wrong.size:
                    raise DataError(
                        f"{source.data.prefix}.bin: token {start + int(wrong[0])} has id {int(ids[wrong[0]])}; "
                        f"expected 0 .. {vocab_size - 1} for model.vocab_size = {vocab_size}; "
                        "were the data made with another tokenizer?"
                    )

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Compare a tokenizer's hash with the one recorded beside each dataset, where there is a record.

        Raises:
            DataError: a dataset was made with another tokenizer.
        """
        for data in self.datasets:
            if data.info is not None and data.info.tokenizer_hash != tokenizer_hash:
                raise DataError(
                    f"{data.prefix}.json: made with a {data.info.tokenizer_kind} tokenizer of hash "
                    f"{data.info.tokenizer_hash}; data.tokenizer has {tokenizer_hash}; "
                    "name the tokenizer of the data, or preprocess the text again"
                )


@dataclass(frozen=True)
class _Source:
    """Tokens [begin, end) of one dataset as epochs of `num_samples` samples each."""

    data: IndexedDataset
    name: str
    occurrence: int  # how many datasets of this name come before it in the mixture
    begin: int
    end: int
    num_samples: int
    seq_length: int
    seed: int

    def locate(self, draw: int) -> tuple[int, int, int]:
        """The epoch, the sample's number in the file's order, and its first token. Cut points move every epoch."""
        epoch, i = divmod(draw, self.num_samples)
        key = (self.seed, self.name, self.occurrence, epoch)
        number = Permutation(self.num_samples, *key)(i)
        offset = keyed_below(self.seq_length, "offset", *key)
        return epoch, number, self.begin + offset + number * self.seq_length

    def probes(self) -> list[tuple[int, Array]]:
        """Tokens at evenly spaced places, the first and the last among them, each with its offset."""
        count = min(PROBE_TOKENS, self.end - self.begin)
        places = np.linspace(self.begin, self.end - count, PROBES).astype(np.int64)
        return [(start, self.data.tokens(start, count)) for start in np.unique(places).tolist()]

    def identity(self) -> list[Any]:
        count = min(PROBE_TOKENS, self.end - self.begin)
        ends = [self.data.tokens(start, count).astype("<i8").tobytes() for start in (self.begin, self.end - count)]
        content = hashlib.blake2b(b"".join(ends), digest_size=16).hexdigest()
        numbers = [self.occurrence, self.begin, self.end, self.num_samples, self.seq_length, self.seed]
        return [self.name, *numbers, content]


def part_range(data: IndexedDataset, split: Sequence[float], part: Part) -> tuple[int, int]:
    """The tokens [begin, end) of a part: its share of the documents, counted cumulatively and rounded.

    Raises:
        ConfigError: shares that are negative, not finite or all zero.
    """
    if not all(math.isfinite(share) and share >= 0 for share in split) or sum(split) <= 0:
        raise ConfigError(f"data.split = {list(split)}: shares must be finite, >= 0 and not all zero")
    total, at = sum(map(Fraction, split)), PARTS.index(part)
    cuts = [sum(map(Fraction, split[:k])) * data.num_documents / total for k in (at, at + 1)]
    begin, end = (data.document_start(int(cut + Fraction(1, 2))) for cut in cuts)
    return begin, end


def _check_recorded(data: IndexedDataset, vocab_size: int) -> None:
    if data.info is not None and data.info.vocab_size > vocab_size:
        raise DataError(
            f"{data.prefix}.json: made with a vocabulary of {data.info.vocab_size}, larger than "
            f"model.vocab_size = {vocab_size}; raise the latter or use the tokenizer that belongs to the model"
        )

"""Shared types: a sample, its location in a dataset, and the splits train, valid and test.

Legend: S sequence length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.data.storage.files import Ints
from engine.errors import ConfigError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes:
        tokens: int64 [S].
        labels: int64 [S], the next token of each.
        boundaries: int64, offsets in (0, S) at which documents start.
        target_mask: bool [S], True if the label is a target of the loss; None: all are.
    """

    tokens: Ints
    labels: Ints
    boundaries: Ints
    target_mask: npt.NDArray[np.bool_] | None = None

    @classmethod
    def following(cls, tokens: Ints, boundaries: Ints) -> "Sample":
        """Build a sample from S + 1 consecutive tokens."""
        return cls(tokens[:-1], tokens[1:], boundaries)


@dataclass(frozen=True)
class Location:
    """The location of a sample: dataset, epoch, number in file order, and first token in the `.bin`."""

    dataset: int
    name: str
    epoch: int
    number: int
    start: int


def part_documents(num_documents: int, split: Sequence[float], part: Split) -> tuple[int, int]:
    """Return the documents [begin, end) of one split, with rounded cumulative boundaries.

    Raises:
        ConfigError: sizes that are negative, not finite or all zero.
    """
    if not all(math.isfinite(share) and share >= 0 for share in split) or sum(split) <= 0:
        raise ConfigError(f"data.split = {list(split)}: shares must be finite, >= 0 and not all zero")
    total, at = sum(map(Fraction, split)), SPLITS.index(part)
    begin, end = (sum(map(Fraction, split[:k])) * num_documents / total for k in (at, at + 1))
    return int(begin + Fraction(1, 2)), int(end + Fraction(1, 2))

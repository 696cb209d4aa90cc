"""The shared types: a sample, its location in a dataset, and the splits of a dataset into train, valid and test.

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
        labels: int64 [S], the next token after each of them.
        boundaries: offsets in (0, S) at which a document starts.
        target_mask: bool [S], which labels are targets of the loss; None: all.
    """

    tokens: Ints
    labels: Ints
    boundaries: Ints
    target_mask: npt.NDArray[np.bool_] | None = None

    @classmethod
    def following(cls, tokens: Ints, boundaries: Ints) -> "Sample":
        """From consecutive tokens [S + 1]; the last is only a label."""
        return cls(tokens[:-1], tokens[1:], boundaries)


@dataclass(frozen=True)
class Location:
    """Sample `number` of an epoch of a dataset; it starts at token `start` of the `.bin`."""

    dataset: int
    name: str
    epoch: int
    number: int
    start: int


def part_documents(num_documents: int, split: Sequence[float], part: Split) -> tuple[int, int]:
    """The documents [begin, end) of one split: its share, counted cumulatively and rounded.

    Raises:
        ConfigError: shares that are negative, not finite or all zero.
    """
    if not all(math.isfinite(share) and share >= 0 for share in split) or sum(split) <= 0:
        raise ConfigError(f"data.split = {list(split)}: shares must be finite, >= 0 and not all zero")
    total, at = sum(map(Fraction, split)), SPLITS.index(part)
    begin, end = (sum(map(Fraction, split[:k])) * num_documents / total for k in (at, at + 1))
    return int(begin + Fraction(1, 2)), int(end + Fraction(1, 2))

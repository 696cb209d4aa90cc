"""Mixes datasets: maps sample i to a dataset and a draw from it, by arithmetic, without an index.

A mixture consists of blocks of 2^20 samples, to which each dataset contributes a fixed number. In a block, the datasets
are interleaved as evenly as integers allow, each in its own order, so every range of samples has the configured
proportions, and an epoch of a dataset ends before its next one begins. Alternative considered: shuffling the positions
of a block; a dataset smaller than its share of a block would then be drawn at random with repetition.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from engine.data.samples.permutation import UInts
from engine.errors import ConfigError

SAMPLES_PER_BLOCK = 1 << 20


class Mixture:
    """The shares of datasets in the samples of a run.

    Args:
        weights: relative shares, any positive numbers.

    Raises:
        ConfigError: a weight is not a positive number, or too small for one sample per block.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = block_counts(weights)  # samples of each dataset in a block

    def draw(self, i: int) -> tuple[int, int]:
        """Return the dataset of sample `i`, and the number of the draw from that dataset since the start of the run.

        The first dataset takes the positions of a block at which its proportional count increases; the second does the
        same with the remaining positions, and so on.
        """
        block, position = divmod(i, SAMPLES_PER_BLOCK)
        left = SAMPLES_PER_BLOCK
        for dataset, count in enumerate(self.counts):
            before = position * count // left  # this dataset's samples at earlier positions
            if (position + 1) * count // left > before:
                return dataset, block * count + before
            position -= before
            left -= count
        raise AssertionError("the last dataset takes every remaining position")

    def many(self, numbers: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], UInts]:
        """Vectorized `draw`: datasets, int64, and draws, uint64, in the shape of `numbers`."""
        block, position = np.divmod(numbers.astype(np.uint64), np.uint64(SAMPLES_PER_BLOCK))
        datasets = np.full(numbers.shape, -1, np.int64)
        draws = np.zeros(numbers.shape, np.uint64)
        left = SAMPLES_PER_BLOCK
        for dataset, count in enumerate(self.counts):
            before = position * count // left
            taken = (datasets < 0) & ((position + 1) * count // left > before)
            datasets[taken] = dataset
            draws[taken] = (block * count + before)[taken]
            position = position - before
            left -= count
        return datasets, draws


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the samples of each dataset in a block: integers with the exact sum, by the largest-remainder method."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.train weight = {weight}; expected a positive number")
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) * SAMPLES_PER_BLOCK / total for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda d: (counts[d] - shares[d], d))
    for d in by_remainder[: SAMPLES_PER_BLOCK - sum(counts)]:
        counts[d] += 1
    for weight, count in zip(weights, counts, strict=True):
        if count == 0:
            raise ConfigError(
                f"data.train weight = {weight} of a total of {float(total)} is less than one sample in "
                f"{SAMPLES_PER_BLOCK:,}; raise this weight or remove the dataset"
            )
    return tuple(counts)

"""Which draw of which dataset is sample i, and in which order an epoch is read: pure arithmetic, no index.

An order is a keyed bijection of `[0, n)`: a Feistel network over the next power of two, walked until it falls
below n. It needs no memory and costs the same for every number, so there is nothing to build, cache or send
to other ranks. Rejected: shuffled index files, which take minutes and gigabytes for 10^12 tokens.

A mixture runs in blocks of 2^20 samples, to which each dataset contributes a whole number. Inside a block the
datasets are interleaved as evenly as whole numbers allow, each in its own order: every stretch of samples has
the stated proportions, and one epoch of a dataset ends before its next begins. Rejected: shuffling the
positions of a block; a dataset smaller than its share of a block is then drawn at random with repetition.

All of it works on single numbers and, by the same lines, on vectors of uint64.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError

BLOCK_SIZE = 1 << 20
ROUNDS = 16  # of the Feistel network; with 8, orders of five or six samples are visibly uneven
MASK = (1 << 64) - 1

UInts = npt.NDArray[np.uint64]


def keyed_bytes(count: int, *parts: str | int) -> bytes:
    """Bytes that depend on every part: the source of all randomness here."""
    return hashlib.shake_128(json.dumps(parts).encode()).digest(count)


def keyed_below(limit: int, *parts: str | int) -> int:
    """A number in `[0, limit)` drawn from the parts."""
    return int.from_bytes(keyed_bytes(16, *parts), "little") % limit


class Permutation:
    """A bijection of `[0, size)`, size up to 2^62, that depends on every part of its key."""

    def __init__(self, size: int, *key: str | int) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"size = {size}; expected 1 .. 2^62")
        bits = (size - 1).bit_length()
        self.size = size
        self._low_bits = bits // 2
        self._masks = (1 << bits // 2) - 1, (1 << bits - bits // 2) - 1  # of the low and the high part
        self._round_keys = np.frombuffer(keyed_bytes(8 * ROUNDS, "permutation", *key), "<u8").tolist()

    def __call__(self, i: int) -> int:
        """Where `i` goes. Under two steps on average, as the network spans less than `2 * size`."""
        if not 0 <= i < self.size:
            raise IndexError(f"{i} is not in [0, {self.size})")
        i = self._network(i)
        while i >= self.size:
            i = self._network(i)
        return i

    def many(self, numbers: npt.NDArray[np.integer]) -> UInts:
        """Where each of `numbers` goes; equal to calling for each of them."""
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.size:
            raise IndexError(f"{numbers.min()} .. {numbers.max()} is not in [0, {self.size})")
        result = self._network(numbers.astype(np.uint64))
        while (outside := result >= self.size).any():
            result[outside] = self._network(result[outside])
        return result

    def _network(self, x: Any) -> Any:
        """Each round changes one part of the bits by a function of the other, so each can be undone."""
        low_mask, high_mask = self._masks
        low, high = x & low_mask, x >> self._low_bits
        for even, odd in zip(self._round_keys[::2], self._round_keys[1::2], strict=True):
            high = high ^ (_mix(low ^ even) & high_mask)
            low = low ^ (_mix(high ^ odd) & low_mask)
        return (high << self._low_bits) | low


class Mixture:
    """How the samples of a run are shared between datasets.

    Args:
        weights: relative shares, any positive numbers.

    Raises:
        ConfigError: a weight is not a positive number or too small to get a sample in a block.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = block_counts(weights)  # samples of each dataset in a block

    def draw(self, i: int) -> tuple[int, int]:
        """Sample `i` as (dataset, number of the draw from that dataset over the whole run).

        A block is a stream of positions. The first dataset takes those at which its proportional count goes
        up; the others see the stream of what is left, and so on.
        """
        block, position = divmod(i, BLOCK_SIZE)
        left = BLOCK_SIZE
        for dataset, count in enumerate(self.counts):
            before = position * count // left  # this dataset's samples at earlier positions
            if (position + 1) * count // left > before:
                return dataset, block * count + before
            position -= before
            left -= count
        raise AssertionError("the last dataset takes every position that is left")

    def many(self, numbers: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], UInts]:
        """`draw` for each of `numbers`, as two vectors."""
        block, position = np.divmod(numbers.astype(np.uint64), np.uint64(BLOCK_SIZE))
        datasets = np.full(numbers.shape, -1, np.int64)
        draws = np.zeros(numbers.shape, np.uint64)
        left = BLOCK_SIZE
        for dataset, count in enumerate(self.counts):
            before = position * count // left
            taken = (datasets < 0) & ((position + 1) * count // left > before)
            datasets[taken] = dataset
            draws[taken] = (block * count + before)[taken]
            position = position - before
            left -= count
        return datasets, draws


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each dataset in a block: proportional, whole, adding up exactly (largest remainder)."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.train weight = {weight}; expected a positive number")
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) * BLOCK_SIZE / total for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda d: (counts[d] - shares[d], d))
    for d in by_remainder[: BLOCK_SIZE - sum(counts)]:
        counts[d] += 1
    for weight, count in zip(weights, counts, strict=True):
        if count == 0:
            raise ConfigError(
                f"data.train weight = {weight} of {float(total)} in all is less than one sample in "
                f"{BLOCK_SIZE:,}; raise this weight or leave the dataset out"
            )
    return tuple(counts)


def _mix(x: Any) -> Any:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): an input bit changes half of the output's."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)

"""Keyed permutations: the shuffle of an epoch, and the only source of randomness in the data.

A permutation is a keyed bijection of `[0, n)`: a Feistel network over the next power of two, applied until the value is
below n. It needs no memory, and nothing has to be built, cached or broadcast to other ranks. The same code works on
single numbers and on vectors of uint64. Alternative considered: shuffled index files, which take minutes and gigabytes
for 10^12 tokens.
"""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 16  # of the Feistel network; with 8, orders of five or six samples are visibly uneven
MASK = (1 << 64) - 1

UInts = npt.NDArray[np.uint64]


def keyed_bytes(count: int, *parts: str | int) -> bytes:
    """Return `count` pseudorandom bytes, keyed by `parts`."""
    return hashlib.shake_128(json.dumps(parts).encode()).digest(count)


def keyed_below(limit: int, *parts: str | int) -> int:
    """Return a pseudorandom number in `[0, limit)`, keyed by `parts`."""
    return int.from_bytes(keyed_bytes(16, *parts), "little") % limit


class Permutation:
    """A keyed bijection of `[0, size)`, for sizes up to 2^62."""

    def __init__(self, size: int, *key: str | int) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"size = {size}; expected 1 .. 2^62")
        bits = (size - 1).bit_length()
        self.size = size
        self._low_bits = bits // 2
        self._masks = (1 << bits // 2) - 1, (1 << bits - bits // 2) - 1  # of the low and the high part
        self._round_keys = np.frombuffer(keyed_bytes(8 * ROUNDS, "permutation", *key), "<u8").tolist()

    def __call__(self, i: int) -> int:
        """Return the image of `i`. Takes fewer than two steps on average, as the network spans less than `2 * size`."""
        if not 0 <= i < self.size:
            raise IndexError(f"{i} is not in [0, {self.size})")
        i = self._network(i)
        while i >= self.size:
            i = self._network(i)
        return i

    def many(self, numbers: npt.NDArray[np.integer]) -> UInts:
        """Return the images of `numbers`; vectorized `__call__`."""
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.size:
            raise IndexError(f"{numbers.min()} .. {numbers.max()} is not in [0, {self.size})")
        result = self._network(numbers.astype(np.uint64))
        while (outside := result >= self.size).any():
            result[outside] = self._network(result[outside])
        return result

    def _network(self, x: Any) -> Any:
        """Apply the Feistel rounds; each is invertible: it XORs one part of the bits with a function of the other."""
        low_mask, high_mask = self._masks
        low, high = x & low_mask, x >> self._low_bits
        for even, odd in zip(self._round_keys[::2], self._round_keys[1::2], strict=True):
            high = high ^ (_mix(low ^ even) & high_mask)
            low = low ^ (_mix(high ^ odd) & low_mask)
        return (high << self._low_bits) | low


def _mix(x: Any) -> Any:
    """Mix bits by the finalizer of splitmix64 (Steele, Lea and Flood 2014); each input bit flips half of the output."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)

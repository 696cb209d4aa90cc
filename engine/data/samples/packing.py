"""Packs conversations of different lengths into rows of fixed length with best-fit decreasing.

The packing depends only on lengths, so it is computed on counts by length, and items of equal length are placed
together. It takes a second for ten million conversations and is the same in every epoch; only the assignment of
conversations of each length changes. The result equals best-fit decreasing over single items, because equal items are
interchangeable. Alternatives considered: first fit in the order of the data, whose rows are less full; splitting
conversations to fill the gaps, which separates answers from their questions.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from engine.data.storage.files import Ints

Pattern = tuple[tuple[int, int], ...]
"""The contents of a row: (length, number of items of that length), longest first."""


@dataclass(frozen=True)
class Packing:
    """Rows of `capacity` tokens: `counts[i]` of them have the contents `patterns[i]`."""

    capacity: int
    patterns: tuple[Pattern, ...]
    counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @property
    def efficiency(self) -> float:
        """The fraction of the rows' tokens that are not padding."""
        sizes = (sum(length * many for length, many in pattern) for pattern in self.patterns)
        used = sum(size * count for size, count in zip(sizes, self.counts, strict=True))
        return used / (self.num_rows * self.capacity)


def one_per_row(lengths: Ints, capacity: int) -> Packing:
    """Pack one item per row."""
    sizes, counts = np.unique(lengths, return_counts=True)
    return Packing(capacity, tuple(((size, 1),) for size in sizes.tolist()), tuple(counts.tolist()))


def best_fit(lengths: Ints, capacity: int) -> Packing:
    """Pack by best-fit decreasing: from longest to shortest, each item goes into the fullest row with room for it.

    Args:
        lengths: lengths of the items, each in [1, capacity].
        capacity: length of a row.
    """
    rows = _OpenRows(capacity)
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        rows.place(size, count)
    found: dict[Pattern, int] = defaultdict(int)
    for queue in rows.by_room.values():
        for pattern, count in queue:
            found[pattern] += count
    patterns = sorted(found, reverse=True)
    return Packing(capacity, tuple(patterns), tuple(found[pattern] for pattern in patterns))


class _OpenRows:
    """Rows that are being filled, counted by pattern."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.by_room: dict[int, list[tuple[Pattern, int]]] = defaultdict(list)  # by remaining room in the row
        self.rooms: list[int] = []  # the keys of `by_room`, increasing

    def place(self, size: int, count: int) -> None:
        """Place `count` items of `size`.

        The row with the least sufficient room is filled first: after each item it still has the least room.
        """
        while count:
            at = bisect_left(self.rooms, size)
            if at == len(self.rooms):
                self._open(size, count)
                return
            room = self.rooms[at]
            pattern, rows = self.by_room[room].pop()
            many = room // size
            full, rest = divmod(count, many)
            taken = min(rows, full)
            self._add(room - many * size, (*pattern, (size, many)), taken)
            count -= taken * many
            if taken < rows and count:  # fewer items left than one row takes
                self._add(room - rest * size, (*pattern, (size, rest)), 1)
                taken, count = taken + 1, 0
            self._add(room, pattern, rows - taken)
            if not self.by_room[room]:
                del self.by_room[room]
                del self.rooms[bisect_left(self.rooms, room)]

    def _open(self, size: int, count: int) -> None:
        many = self.capacity // size
        full, rest = divmod(count, many)
        self._add(self.capacity - many * size, ((size, many),), full)
        if rest:
            self._add(self.capacity - rest * size, ((size, rest),), 1)

    def _add(self, room: int, pattern: Pattern, rows: int) -> None:
        if rows:
            if room not in self.by_room:
                insort(self.rooms, room)
            self.by_room[room].append((pattern, rows))

"""Packing conversations of many lengths into rows of one length: best fit, longest first.

What goes together depends on lengths alone, so the plan is made for lengths and not for conversations: items are
counted by length and those of one length are placed at once. It takes a second for ten million conversations and stays
the same in every epoch; only which conversation of a length stands where is drawn anew. The result is that of best-fit
decreasing over the single items, as equal items are interchangeable. Rejected: first fit in the order of the data,
whose rows are less full, and cutting conversations to fill the gaps, which hides from a model what it is to answer.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from engine.data.storage.files import Ints

Pattern = tuple[tuple[int, int], ...]
"""What a row holds: (length, how many of that length), longest first."""


@dataclass(frozen=True)
class Packing:
    """`counts[i]` rows, each of which holds `patterns[i]`. `capacity` is the length of a row."""

    capacity: int
    patterns: tuple[Pattern, ...]
    counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold something."""
        sizes = (sum(length * many for length, many in pattern) for pattern in self.patterns)
        used = sum(size * count for size, count in zip(sizes, self.counts, strict=True))
        return used / (self.num_rows * self.capacity)


def alone(lengths: Ints, capacity: int) -> Packing:
    """Every item in a row of its own."""
    sizes, counts = np.unique(lengths, return_counts=True)
    return Packing(capacity, tuple(((size, 1),) for size in sizes.tolist()), tuple(counts.tolist()))


def best_fit(lengths: Ints, capacity: int) -> Packing:
    """Best-fit decreasing: each item goes into the fullest row that has room for it, the longest items first.

    Args:
        lengths: of the items, each in [1, capacity].
        capacity: of a row.
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
    """Rows that are being filled; those of one pattern are counted and not kept apart."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.by_room: dict[int, list[tuple[Pattern, int]]] = defaultdict(list)  # by what is left in the row
        self.rooms: list[int] = []  # in which there are rows, rising

    def place(self, size: int, count: int) -> None:
        """Place `count` items. A row with the least room that is enough takes items until it has no room for one more:
        it has the least room still."""
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
            if taken < rows and count:  # fewer than a row would take
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

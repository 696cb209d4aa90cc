from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.samples.packing import Packing, best_fit, one_per_row


def rooms(packing: Packing) -> Counter[int]:
    """How many rows there are with each room left."""
    left: Counter[int] = Counter()
    for pattern, count in zip(packing.patterns, packing.counts, strict=True):
        left[packing.capacity - sum(length * many for length, many in pattern)] += count
    return left


def items(packing: Packing) -> Counter[int]:
    held: Counter[int] = Counter()
    for pattern, count in zip(packing.patterns, packing.counts, strict=True):
        for length, many in pattern:
            held[length] += many * count
    return held


def one_by_one(lengths: list[int], capacity: int) -> Counter[int]:
    """Best-fit decreasing as it is written in books."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in range(len(rows)) if rows[row] >= length]
        if fits:
            rows[min(fits, key=lambda row: rows[row])] -= length
        else:
            rows.append(capacity - length)
    return Counter(rows)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=150)))
)
def test_it_is_best_fit_decreasing_over_the_single_items(case):
    capacity, lengths = case
    packing = best_fit(np.array(lengths), capacity)
    assert items(packing) == Counter(lengths)
    assert rooms(packing) == one_by_one(lengths, capacity)
    assert packing == best_fit(np.array(sorted(lengths)), capacity)  # whatever the order


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [2_000, 200_000])
def test_long_tailed_lengths_fill_98_percent(seed, count):
    lengths = np.random.default_rng(seed).lognormal(5.5, 1.0, count).astype(int).clip(1, 4096)
    packing = best_fit(lengths, 4096)
    assert items(packing).total() == count
    assert packing.efficiency >= 0.98
    assert packing.efficiency == pytest.approx(lengths.sum() / (packing.num_rows * 4096))


def test_unpacked_every_item_has_a_row_of_its_own():
    packing = one_per_row(np.array([3, 5, 3]), 8)
    assert packing == Packing(8, (((3, 1),), ((5, 1),)), (2, 1))
    assert packing.num_rows == 3 and packing.efficiency == 11 / 24


def test_many_different_lengths_do_not_take_quadratic_time():
    """Two hundred thousand of them took 22 s when each emptied kind of row was searched for."""
    lengths = np.random.default_rng(0).integers(1, 200_001, 200_000)
    assert items(best_fit(lengths, 200_000)).total() == 200_000

"""Permutations are bijections, mixtures keep their proportions, and vectors agree with numbers."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.samples.mixture import SAMPLES_PER_BLOCK, Mixture, block_counts
from engine.data.samples.permutation import Permutation, keyed_below
from engine.errors import ConfigError

POWERS = [n for bits in range(1, 14) for n in (2**bits - 1, 2**bits, 2**bits + 1)]


@pytest.mark.parametrize("size", sorted({1, 5, 6, 10, 100, 1000, 99_991, *POWERS}))
def test_a_permutation_takes_each_value_once(size):
    moved = Permutation(size, 7, "web", 3).many(np.arange(size))
    assert np.array_equal(np.sort(moved), np.arange(size))


@given(size=st.integers(1, 1 << 62), seed=st.integers(0, 1 << 64), data=st.data())
@settings(max_examples=200, deadline=None)
def test_numbers_and_vectors_agree_up_to_2_to_62(size, seed, data):
    numbers = [*data.draw(st.lists(st.integers(0, size - 1), max_size=5)), 0, size - 1]
    permutation = Permutation(size, seed)
    moved = permutation.many(np.array(numbers, np.uint64))
    assert moved.tolist() == [permutation(i) for i in numbers]
    assert int(moved.max()) < size
    assert len(set(moved.tolist())) == len(set(numbers))


def test_every_part_of_the_key_changes_the_order():
    keys = [(1, "web", 0), (2, "web", 0), (1, "code", 0), (1, "web", 1), (1, "web", 0, 0), ("1", "web", 0)]
    orders = {tuple(Permutation(50, *key).many(np.arange(50)).tolist()) for key in keys}
    assert len(orders) == len(keys)
    assert Permutation(50, *keys[0])(3) == Permutation(50, *keys[0])(3)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 8, 17])
def test_over_many_keys_a_value_goes_everywhere_equally_often(size):
    trials = 4000
    seen = Counter((i, Permutation(size, key)(i)) for key in range(trials) for i in (0, size - 1))
    expected = trials / size
    for i in (0, size - 1):
        chi_square = sum((seen[i, to] - expected) ** 2 / expected for to in range(size))
        assert chi_square < size - 1 + 5 * (2 * size) ** 0.5  # five standard deviations


def test_neighbors_do_not_stay_neighbors():
    moved = Permutation(1 << 16, 1).many(np.arange(1 << 16)).astype(np.int64)
    assert abs(np.corrcoef(moved, np.arange(1 << 16))[0, 1]) < 0.02
    assert (np.abs(np.diff(moved)) == 1).mean() < 1e-3


@pytest.mark.parametrize("i", [-1, 10])
def test_outside_of_a_permutation(i):
    with pytest.raises(IndexError, match=r"\[0, 10\)"):
        Permutation(10, 1)(i)
    with pytest.raises(IndexError, match=r"\[0, 10\)"):
        Permutation(10, 1).many(np.array([3, i]))


def test_offsets_stay_below_their_limit():
    assert {keyed_below(4, "offset", epoch) for epoch in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "weights, counts",
    [
        ([3.0], (SAMPLES_PER_BLOCK,)),
        ([1, 3], (SAMPLES_PER_BLOCK // 4, 3 * SAMPLES_PER_BLOCK // 4)),
        ([1, 1, 1], (349_526, 349_525, 349_525)),  # the sample left over goes to the first of equals
        ([0.7, 0.2, 0.1], (734_003, 209_715, 104_858)),
        ([1e300, 1e300], (SAMPLES_PER_BLOCK // 2, SAMPLES_PER_BLOCK // 2)),
        ([SAMPLES_PER_BLOCK - 1, 1], (SAMPLES_PER_BLOCK - 1, 1)),
    ],
)
def test_blocks_are_shared_by_the_largest_remainder(weights, counts):
    assert block_counts(weights) == counts
    assert sum(counts) == SAMPLES_PER_BLOCK


@pytest.mark.parametrize("weight", [1e-9, 0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_makes_no_sample_is_named(weight):
    with pytest.raises(ConfigError, match=f"weight = {weight}"):
        Mixture([1.0, weight])


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2, 0.1], [1] * 7, [5, 1e-5, 2], [1, 1000]])
@pytest.mark.parametrize("block", [0, 10**6])
def test_a_block_draws_each_dataset_in_order_and_as_often_as_stated(weights, block):
    mixture = Mixture(weights)
    datasets, draws = mixture.many(np.arange(SAMPLES_PER_BLOCK) + block * SAMPLES_PER_BLOCK)
    for dataset, count in enumerate(mixture.counts):
        assert np.array_equal(draws[datasets == dataset], np.arange(block * count, (block + 1) * count))


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1] * 7, [5, 1, 1, 1, 0.01]])
def test_any_stretch_of_samples_has_the_stated_proportions(weights):
    mixture = Mixture(weights)
    datasets, _ = mixture.many(np.arange(SAMPLES_PER_BLOCK))
    for dataset, count in enumerate(mixture.counts):
        ideal = np.arange(1, SAMPLES_PER_BLOCK + 1) * count / SAMPLES_PER_BLOCK
        assert np.abs(np.cumsum(datasets == dataset) - ideal).max() < 2


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9), i=st.integers(0, 10**14))
@settings(max_examples=300, deadline=None)
def test_numbers_and_vectors_of_a_mixture_agree(weights, i):
    mixture = Mixture(weights)
    dataset, draw = mixture.draw(i)
    datasets, draws = mixture.many(np.array([i]))
    assert (dataset, draw) == (int(datasets[0]), int(draws[0]))
    block = i // SAMPLES_PER_BLOCK
    assert block * mixture.counts[dataset] <= draw < (block + 1) * mixture.counts[dataset]

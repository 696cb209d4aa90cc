from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.parallel.pipeline.partition import Part, partition


def counts(*arguments) -> list[int]:
    return [len(part.layers) for part in partition(*arguments)]


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 5))
def test_parts_are_the_model_in_order(num_layers, num_parts, head_cost):
    if num_parts > num_layers:
        return
    parts = partition(num_layers, num_parts, head_cost)
    assert [layer for part in parts for layer in part.layers] == list(range(num_layers))
    assert [part.has_embedding for part in parts] == [k == 0 for k in range(num_parts)]
    assert [part.has_head for part in parts] == [k == num_parts - 1 for k in range(num_parts)]
    assert all(part.layers for part in parts[:-1])


@given(st.integers(1, 9), st.integers(1, 4), st.floats(0, 5))
def test_by_cost_the_most_expensive_part_is_as_cheap_as_can_be(num_layers, num_parts, head_cost):
    if num_parts > num_layers:
        return

    def most(layers) -> float:
        return max(count + head_cost * (k == num_parts - 1) for k, count in enumerate(layers))

    everyway = product(range(num_layers + 1), repeat=num_parts)
    best = min(most(layers) for layers in everyway if sum(layers) == num_layers)
    assert most(counts(num_layers, num_parts, head_cost)) == best


@pytest.mark.parametrize(
    ("head_cost", "expected"),
    [
        (0.0, [2, 2, 2, 3]),  # of equals the later stage, which keeps fewer microbatches
        (0.6, [2, 2, 3, 2]),
        (1.9, [2, 3, 3, 1]),
        (3.5, [3, 3, 3, 0]),  # a head alone
    ],
)
def test_the_head_counts_as_layers(head_cost, expected):
    assert counts(9, 4, head_cost) == expected


def test_an_explicit_list():
    assert partition(5, 3, 9.9, [0, 5, 0]) == [
        Part(range(0, 0), has_embedding=True, has_head=False),
        Part(range(0, 5), has_embedding=False, has_head=False),
        Part(range(5, 5), has_embedding=False, has_head=True),
    ]
    assert counts(5, 2, 9.9, [2, 3]) == [2, 3]


@pytest.mark.parametrize(
    ("explicit", "expected"),
    [
        ([2, 2, 1], "has 3 numbers, and parallel.pp × parallel.virtual_stages = 2; null divides"),
        ([2, 2], "adds up to 4, and model.num_layers = 5; null divides the layers by cost"),
        ([2, 0, 2], r"= \[2, 0, 2\] has 3 numbers.*; it adds up to 4.*; it has a part without layers that is neither"),
    ],
)
def test_explicit_lists_that_do_not_fit(explicit, expected):
    with pytest.raises(ConfigError, match=expected):
        partition(5, 2, 0.0, explicit)


def test_more_parts_than_layers():
    with pytest.raises(ConfigError, match=r"virtual_stages = 6 parts are more than model.num_layers = 5; .* at most 5"):
        partition(5, 6, 0.0)
    assert counts(5, 6, 0.0, [1, 1, 1, 1, 1, 0]) == [1, 1, 1, 1, 1, 0]

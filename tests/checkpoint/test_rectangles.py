import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint.rectangles import covers_exactly, flat_slice, intersect, relative, row_blocks, stop_of
from engine.parallel.table import Rectangle


def elements(tensor: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    stops = zip(rectangle.start, stop_of(rectangle), strict=True)
    return tensor[tuple(slice(first, stop) for first, stop in stops)]


shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@given(st.data(), shapes)
@settings(max_examples=300, deadline=None)
def test_flat_slice_is_the_slice(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    tensor = torch.arange(size).reshape(shape)
    parts = flat_slice(Rectangle((0,) * len(shape), shape), begin, end)
    found = torch.cat([elements(tensor, part).reshape(-1) for part in parts]) if parts else torch.empty(0)
    assert found.tolist() == list(range(begin, end))
    assert len(parts) <= 2 ** max(0, len(shape) - 1) + (len(shape) > 1) * len(shape)


def test_flat_slice_of_a_matrix_is_at_most_three_rectangles_in_global_coordinates() -> None:
    assert flat_slice(Rectangle((10, 20), (4, 5)), 3, 18) == [
        Rectangle((10, 23), (1, 2)),
        Rectangle((11, 20), (2, 5)),
        Rectangle((13, 20), (1, 3)),
    ]
    assert flat_slice(Rectangle((10, 20), (4, 5)), 6, 8) == [Rectangle((11, 21), (1, 2))]
    assert all(
        len(flat_slice(Rectangle((0, 0), (4, 5)), begin, end)) <= 3 for begin in range(21) for end in range(begin, 21)
    )


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_intersect_is_what_both_hold(data: st.DataObject) -> None:
    def box() -> Rectangle:
        start = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        return Rectangle(start, data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))))

    a, b = box(), box()
    count = torch.zeros(8, 8)
    elements(count, a).add_(1)
    elements(count, b).add_(1)
    shared = intersect(a, b)
    if shared:
        elements(count, shared).sub_(2)
    assert not (count == 2).any()
    assert (count >= 0).all()


def cut(rectangle: Rectangle, rng: random.Random, times: int) -> list[Rectangle]:
    """A random exact cover."""
    splittable = [d for d, count in enumerate(rectangle.extent) if count > 1]
    if times == 0 or not splittable:
        return [rectangle]
    dim = rng.choice(splittable)
    at = rng.randint(1, rectangle.extent[dim] - 1)
    low, high = list(rectangle.extent), list(rectangle.extent)
    low[dim], high[dim] = at, rectangle.extent[dim] - at
    start = list(rectangle.start)
    start[dim] += at
    first, second = Rectangle(rectangle.start, tuple(low)), Rectangle(tuple(start), tuple(high))
    return cut(first, rng, times - 1) + cut(second, rng, times - 1)


@pytest.mark.parametrize("shape", [(), (7,), (6, 9), (4, 3, 5)])
def test_covers_exactly(shape: tuple[int, ...]) -> None:
    rng = random.Random(0)
    for _ in range(50):
        parts = cut(Rectangle((0,) * len(shape), shape), rng, 4)
        rng.shuffle(parts)
        assert covers_exactly(shape, parts) is None
        assert "missing" in str(covers_exactly(shape, parts[1:]))
        assert "overlap" in str(covers_exactly(shape, [*parts, parts[0]]))
        if shape:
            moved = Rectangle((parts[0].start[0] + 1, *parts[0].start[1:]), parts[0].extent)
            assert covers_exactly(shape, [moved, *parts[1:]]) is not None


def test_covers_exactly_refuses_other_dimensions_and_what_reaches_outside() -> None:
    assert "inside" in str(covers_exactly((4, 4), [Rectangle((0,), (16,))]))
    assert "inside" in str(covers_exactly((4,), [Rectangle((-1,), (4,))]))
    assert "inside" in str(covers_exactly((4,), [Rectangle((0,), (5,))]))


def test_many_rectangles_are_checked_quickly() -> None:
    columns = [Rectangle((0, column), (50_000, 1)) for column in range(20_000)]
    assert covers_exactly((50_000, 20_000), columns) is None


@given(shapes, st.integers(1, 200))
def test_row_blocks_are_the_rows_in_order(shape: tuple[int, ...], max_elements: int) -> None:
    blocks = list(row_blocks(shape, max_elements))
    row = math.prod(shape[1:])
    assert all(block.size <= max(max_elements, row) for block in blocks)
    assert all(block.size + row > max_elements for block in blocks[:-1])
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    assert torch.equal(torch.cat([elements(tensor, block).reshape(-1) for block in blocks]), tensor.reshape(-1))


def test_relative_coordinates() -> None:
    assert relative(Rectangle((5, 3), (2, 1)), Rectangle((4, 3), (9, 9))) == Rectangle((1, 0), (2, 1))

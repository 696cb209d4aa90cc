"""Arithmetic on rectangles, the unit in which checkpoints store tensors.

Pure functions. A flat slice of a sharded optimizer is a few rectangles, loading intersects rectangles, and the check
that every element is stored exactly once is a check on rectangles, so no layout needs special handling. Alternative
considered: one entry per rank and parameter, which only the same layout can read.
"""

import math
from collections.abc import Iterator, Sequence

from engine.parallel.table import Rectangle

Shape = tuple[int, ...]


def whole(shape: Shape) -> Rectangle:
    """Return the rectangle of a whole tensor of `shape`."""
    return Rectangle((0,) * len(shape), shape)


def row_blocks(shape: Shape, max_elements: int) -> Iterator[Rectangle]:
    """Split a tensor of `shape` into blocks of whole rows with up to `max_elements`, or one row, in order."""
    if not shape:
        yield whole(shape)
        return
    rows = max(1, max_elements // math.prod(shape[1:]))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        yield Rectangle((first, *(0 for _ in shape[1:])), (count, *shape[1:]))


def flat_slice(rectangle: Rectangle, begin: int, end: int) -> list[Rectangle]:
    """Split the elements [begin, end) of `rectangle`, in row-major order, into rectangles in the same coordinates.

    Their elements, concatenated, are the slice. A matrix gives at most three: the end of a row, whole rows, the
    beginning of a row.
    """
    if begin >= end:
        return []
    if begin == 0 and end == rectangle.size:
        return [rectangle]
    row = rectangle.size // rectangle.extent[0]
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:
        return _inside_row(rectangle, last, begin - last * row, end - last * row)
    head = _inside_row(rectangle, first - 1, row - (first * row - begin), row)
    rows = Rectangle((rectangle.start[0] + first, *rectangle.start[1:]), (last - first, *rectangle.extent[1:]))
    return head + [rows] * (last > first) + _inside_row(rectangle, last, 0, end - last * row)


def _inside_row(rectangle: Rectangle, row: int, begin: int, end: int) -> list[Rectangle]:
    inner = flat_slice(Rectangle(rectangle.start[1:], rectangle.extent[1:]), begin, end)
    return [Rectangle((rectangle.start[0] + row, *part.start), (1, *part.extent)) for part in inner]


def intersect(a: Rectangle, b: Rectangle) -> Rectangle | None:
    """Return the intersection of two rectangles of one tensor; None if it is empty."""
    start = tuple(max(pair) for pair in zip(a.start, b.start, strict=True))
    stop = tuple(min(pair) for pair in zip(stop_of(a), stop_of(b), strict=True))
    if any(low >= high for low, high in zip(start, stop, strict=True)):
        return None
    return Rectangle(start, tuple(high - low for low, high in zip(start, stop, strict=True)))


def relative(part: Rectangle, box: Rectangle) -> Rectangle:
    """Return `part` in coordinates that begin at the start of `box`."""
    return Rectangle(tuple(a - b for a, b in zip(part.start, box.start, strict=True)), part.extent)


def stop_of(rectangle: Rectangle) -> Shape:
    """Return the end offsets of a rectangle (exclusive), per dimension."""
    return tuple(first + count for first, count in zip(rectangle.start, rectangle.extent, strict=True))


def covers_exactly(shape: Shape, rectangles: Sequence[Rectangle]) -> str | None:
    """Check that `rectangles` contain every element of `shape` exactly once. Return the problem, or None."""
    for rectangle in rectangles:
        if not is_inside(shape, rectangle):
            return f"{slice_notation(rectangle)} is not inside shape {list(shape)}"
    if pair := _overlapping(rectangles, len(shape)):
        return f"{slice_notation(pair[0])} and {slice_notation(pair[1])} overlap"
    covered, wanted = sum(rectangle.size for rectangle in rectangles), math.prod(shape)
    return None if covered == wanted else f"{wanted - covered} of {wanted} elements are missing"


def is_inside(shape: Shape, rectangle: Rectangle) -> bool:
    """Whether `rectangle` is a non-empty box of a tensor of `shape`."""
    if not len(shape) == len(rectangle.start) == len(rectangle.extent):
        return False
    bounds = zip(rectangle.start, rectangle.extent, shape, strict=True)
    return all(first >= 0 and count > 0 and first + count <= size for first, count, size in bounds)


def _overlapping(rectangles: Sequence[Rectangle], num_dims: int) -> tuple[Rectangle, Rectangle] | None:
    """Return two rectangles that overlap. Sweeps along the most split dimension, to compare few pairs."""
    if num_dims == 0:
        return (rectangles[0], rectangles[1]) if len(rectangles) > 1 else None
    dim = max(range(num_dims), key=lambda d: len({rectangle.start[d] for rectangle in rectangles}))
    open_: list[Rectangle] = []
    for rectangle in sorted(rectangles, key=lambda r: r.start[dim]):
        open_ = [other for other in open_ if stop_of(other)[dim] > rectangle.start[dim]]
        for other in open_:
            if intersect(other, rectangle):
                return other, rectangle
        open_.append(rectangle)
    return None


def slice_notation(rectangle: Rectangle) -> str:
    """Format a rectangle as an index, for messages: `[0:128, 64:128]`."""
    stops = zip(rectangle.start, stop_of(rectangle), strict=True)
    return f"[{', '.join(f'{first}:{stop}' for first, stop in stops)}]"

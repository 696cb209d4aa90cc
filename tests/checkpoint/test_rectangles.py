import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import rectangles as fmt
from engine.checkpoint.rectangles import Manifest, Rectangle, State, covers_exactly, flat_slice, intersect
from engine.errors import CheckpointError


def elements(tensor: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    stops = zip(rectangle.start, fmt.stop_of(rectangle), strict=True)
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


def manifest() -> Manifest:
    stored = fmt.StoredRectangle(
        file="state-00000-of-00001.safetensors", key="param/a/0,0", start=(0, 0), extent=(2, 3), xxh3_64="0" * 16
    )
    return Manifest(
        save_number=1,
        state=State(5, 10, 100, "data", {"dp": 1}),
        files={
            "state-00000-of-00001.safetensors": fmt.StoredFile(size=100, xxh3_64="0" * 16),
            "config.yaml": fmt.StoredFile(size=3, xxh3_64="0" * 16),
            "tokenizer/my tok.model": fmt.StoredFile(size=3, xxh3_64="0" * 16),
        },
        tensors={"param": {"a": fmt.StoredTensor(shape=(2, 3), dtype="F32", rectangles=(stored,))}},
    )


def test_manifest_round_trip() -> None:
    assert fmt.decode_manifest(fmt.encode_manifest(manifest()), "m") == manifest()


def test_a_manifest_of_an_older_version_with_a_loss_scale_is_read() -> None:
    body = manifest().model_dump_json().replace('"data_fingerprint"', '"loss_scale":null,"data_fingerprint"').encode()
    checksum = fmt.xxhash.xxh3_64_hexdigest(body).encode()
    assert fmt.decode_manifest(b'{"xxh3_64":"' + checksum + b'","manifest":' + body + b"}\n", "m") == manifest()


def test_every_flipped_bit_and_every_truncation_of_a_manifest_is_found() -> None:
    content = fmt.encode_manifest(manifest())
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        for damaged in (bytes(flipped), content[:position]):
            with pytest.raises(CheckpointError, match=r"^m is damaged"):
                fmt.decode_manifest(damaged, "m")


def edited(**changes: object) -> bytes:
    """A manifest with other content and a matching checksum."""
    return fmt.encode_manifest(manifest().model_copy(update=changes))


def with_rectangle(**changes: object) -> dict[str, dict[str, fmt.StoredTensor]]:
    tensor = manifest().tensors["param"]["a"]
    stored = tensor.rectangles[0].model_copy(update=changes)
    return {"param": {"a": tensor.model_copy(update={"rectangles": (stored,)})}}


HUGE = fmt.StoredTensor(
    shape=(1 << 40,),
    dtype="F32",
    rectangles=(
        fmt.StoredRectangle(
            file="state-00000-of-00001.safetensors", key="param/a/0", start=(0,), extent=(1 << 40,), xxh3_64="0" * 16
        ),
    ),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 2}, "format_version"),
        ({"save_number": 0}, "save_number"),
        ({"tensors": with_rectangle(file="../outside.safetensors")}, "not a listed shard"),
        ({"tensors": with_rectangle(file="config.yaml")}, "not a listed shard"),
        ({"tensors": with_rectangle(key="param/b/0,0")}, "does not match its place"),
        ({"tensors": with_rectangle(extent=(2, 2), key="param/a/0,0")}, "2 of 6 elements are missing"),
        ({"tensors": with_rectangle(start=(1, 0), key="param/a/1,0")}, "does not lie inside"),
        ({"tensors": {"param": {"a": HUGE}}}, "bytes of rectangles"),
        ({"files": manifest().files | {"../x": fmt.StoredFile(size=1, xxh3_64="0" * 16)}}, "not a file of a"),
        ({"files": manifest().files | {"tokenizer/..": fmt.StoredFile(size=1, xxh3_64="0" * 16)}}, "not a file of a"),
        ({"files": manifest().files | {"tokenizer/a/b": fmt.StoredFile(size=1, xxh3_64="0" * 16)}}, "not a file"),
        ({"files": {}}, "config.yaml is not listed"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        fmt.decode_manifest(edited(**changes), "m")


def test_a_json_depth_bomb_is_an_error() -> None:
    body = b"[" * 200_000
    content = b'{"xxh3_64":"' + fmt.xxhash.xxh3_64_hexdigest(body).encode() + b'","manifest":' + body + b"}\n"
    with pytest.raises(CheckpointError):
        fmt.decode_manifest(content, "m")


def test_differences_lists_missing_unexpected_and_mismatched() -> None:
    found = {"a": (1,), "c": (2,), "d": (4,)}
    assert fmt.differences(found, {"a": (1,), "b": (3,), "c": (3,)}) == [
        "b: missing, expected shape [3]",
        "d: unexpected, shape [4]",
        "c: shape [2], expected [3]",
    ]

"""The checkpoint format: rectangles of named tensors, and the manifest that lists them.

Pure. A flat slice of a sharded optimizer is a few rectangles, loading is intersection, and "every element exactly
once" is a check on rectangles, so no layout needs a case of its own. Rejected: one entry per rank and parameter, which
only the same layout can read.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from engine.errors import CheckpointError
from engine.parallel.table import Rectangle

Shape = tuple[int, ...]

DtypeName = Literal["F64", "F32", "BF16", "F16", "I64", "I32", "U8"]
DTYPES: Mapping[DtypeName, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES: Mapping[torch.dtype, DtypeName] = {dtype: name for name, dtype in DTYPES.items()}

CONFIG_FILE = "config.yaml"
TOKENIZER_DIRECTORY = "tokenizer"
_SHARD_NAME = re.compile(r"state-\d{5}-of-\d{5}\.safetensors")
_TOKENIZER_FILE = re.compile(rf"{TOKENIZER_DIRECTORY}/(?!\.\.?$)[^/\0]+")


def flat_slice(rectangle: Rectangle, begin: int, end: int) -> list[Rectangle]:
    """Elements [begin, end) of `rectangle` in row-major order, as rectangles in the same coordinates.

    In order, so that their elements one after another are the slice. At most three for a matrix: the end of a row,
    whole rows, the beginning of a row.
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
    """What two rectangles of one tensor share."""
    start = tuple(max(pair) for pair in zip(a.start, b.start, strict=True))
    stop = tuple(min(pair) for pair in zip(stop_of(a), stop_of(b), strict=True))
    if any(low >= high for low, high in zip(start, stop, strict=True)):
        return None
    return Rectangle(start, tuple(high - low for low, high in zip(start, stop, strict=True)))


def stop_of(rectangle: Rectangle) -> Shape:
    """The first offset behind the rectangle, per dimension."""
    return tuple(first + count for first, count in zip(rectangle.start, rectangle.extent, strict=True))


def covers_exactly(shape: Shape, rectangles: Sequence[Rectangle]) -> str | None:
    """What is wrong when `rectangles` do not hold every element of `shape` exactly once; None when they do."""
    for rectangle in rectangles:
        if not is_inside(shape, rectangle):
            return f"{describe(rectangle)} does not lie inside shape {list(shape)}"
    if pair := _overlapping(rectangles, len(shape)):
        return f"{describe(pair[0])} and {describe(pair[1])} overlap"
    covered, wanted = sum(rectangle.size for rectangle in rectangles), math.prod(shape)
    return None if covered == wanted else f"{wanted - covered} of {wanted} elements are missing"


def is_inside(shape: Shape, rectangle: Rectangle) -> bool:
    """Whether `rectangle` is a non-empty box of a tensor of `shape`."""
    if not len(shape) == len(rectangle.start) == len(rectangle.extent):
        return False
    bounds = zip(rectangle.start, rectangle.extent, shape, strict=True)
    return all(first >= 0 and count > 0 and first + count <= size for first, count, size in bounds)


def _overlapping(rectangles: Sequence[Rectangle], num_dims: int) -> tuple[Rectangle, Rectangle] | None:
    """Two rectangles that share an element. Sweeps along the dimension that is cut most, to compare few pairs."""
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


def describe(rectangle: Rectangle) -> str:
    """For messages: `[0:128, 64:128]`."""
    stops = zip(rectangle.start, stop_of(rectangle), strict=True)
    return f"[{', '.join(f'{first}:{stop}' for first, stop in stops)}]"


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """What keeps `found` from being the tensors `expected`, one line each."""
    missing = [f"{name}: missing, expected shape {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name}: unexpected, shape {list(found[name])}" for name in found if name not in expected]
    mismatched = [
        f"{name}: shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing + unexpected + mismatched


def entry_key(kind: str, name: str, rectangle: Rectangle) -> str:
    """The name of a rectangle inside its safetensors file: `param/model.norm.weight/0`."""
    return f"{kind}/{name}/{','.join(map(str, rectangle.start))}"


def shard_name(rank: int, world_size: int) -> str:
    """The file in which `rank` writes its rectangles."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Best:
    """The evaluation with the lowest loss so far. `worse`: how many evaluations in a row have not been better."""

    step: NonNegativeInt
    loss: float
    worse: NonNegativeInt


@dataclass(frozen=True)
class State:
    """What a run must remember beside its tensors.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples seen; the next one has this number.
        consumed_tokens: tokens seen.
        data_fingerprint: identifies data and order; empty when the weights were imported.
        layout: the layout that wrote it, for people; loading ignores it.
        best: None where evaluations are not compared.
    """

    step: NonNegativeInt
    consumed_samples: NonNegativeInt
    consumed_tokens: NonNegativeInt
    data_fingerprint: str
    layout: dict[str, JsonValue]
    best: Best | None = None


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredFile(_Stored):
    size: NonNegativeInt
    xxh3_64: str = Field(pattern="^[0-9a-f]{16}$")


class StoredRectangle(_Stored):
    """A rectangle, where it lies, and the hash of the live tensor it was written from."""

    file: str
    key: str
    start: tuple[NonNegativeInt, ...]
    extent: tuple[PositiveInt, ...]
    xxh3_64: str = Field(pattern="^[0-9a-f]{16}$")

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.start, self.extent)


class StoredTensor(_Stored):
    shape: tuple[PositiveInt, ...]
    dtype: DtypeName
    rectangles: tuple[StoredRectangle, ...]


class Manifest(_Stored):
    """The table of contents of a checkpoint directory.

    `save_number` counts the saves of a run directory: it orders checkpoints even after a return to an earlier step.
    """

    format_version: Literal[1] = 1
    save_number: PositiveInt
    state: State
    files: dict[str, StoredFile]
    tensors: dict[str, dict[str, StoredTensor]]


def problem_of(manifest: Manifest) -> str | None:
    """What contradicts itself in a manifest. The writer asks before it commits, the reader before it believes."""
    problems = [
        *_file_problems(manifest),
        *_rectangle_problems(manifest),
        *_size_problems(manifest),
    ]
    return "; ".join(problems[:3]) or None


def _file_problems(manifest: Manifest) -> Iterator[str]:
    for name in manifest.files:
        if name != CONFIG_FILE and not _SHARD_NAME.fullmatch(name) and not _TOKENIZER_FILE.fullmatch(name):
            yield f"{name!r} is not a file of a checkpoint"
    if CONFIG_FILE not in manifest.files:
        yield f"{CONFIG_FILE} is not listed"


def _rectangle_problems(manifest: Manifest) -> Iterator[str]:
    for kind, tensors in manifest.tensors.items():
        for name, tensor in tensors.items():
            for stored in tensor.rectangles:
                if stored.file not in manifest.files or not _SHARD_NAME.fullmatch(stored.file):
                    yield f"{kind} {name}: {stored.file!r} is not a listed shard"
                if stored.key != entry_key(kind, name, stored.rectangle):
                    yield f"{kind} {name}: key {stored.key!r} does not match its place"
            if problem := covers_exactly(tensor.shape, [stored.rectangle for stored in tensor.rectangles]):
                yield f"{kind} {name}: {problem}"


def _size_problems(manifest: Manifest) -> Iterator[str]:
    """A file cannot hold more than its size; this also bounds what a reader may be made to allocate."""
    held: Counter[str] = Counter()
    for tensors in manifest.tensors.values():
        for tensor in tensors.values():
            for stored in tensor.rectangles:
                held[stored.file] += stored.rectangle.size * DTYPES[tensor.dtype].itemsize
    for name, file in manifest.files.items():
        if held[name] > file.size:
            yield f"{name} has {file.size} bytes but lists {held[name]} bytes of rectangles"


_PREFIX, _MIDDLE, _SUFFIX = b'{"xxh3_64":"', b'","manifest":', b"}\n"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: the manifest and the hash of its own bytes, so that no flipped digit passes."""
    body = manifest.model_dump_json().encode()
    return _PREFIX + xxhash.xxh3_64_hexdigest(body).encode() + _MIDDLE + body + _SUFFIX


def decode_manifest(content: bytes, source: str) -> Manifest:
    """Read what `encode_manifest` wrote, believing nothing.

    Raises:
        CheckpointError: naming `source` and what is wrong.
    """
    head = len(_PREFIX) + 16
    checksum, body = content[len(_PREFIX) : head], content[head + len(_MIDDLE) : -len(_SUFFIX)]
    if content != _PREFIX + checksum + _MIDDLE + body + _SUFFIX:
        raise CheckpointError(f"{source} is damaged: it is not a complete manifest")
    if xxhash.xxh3_64_hexdigest(body).encode() != checksum:
        raise CheckpointError(f"{source} is damaged: its content does not match its checksum")
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{source}: {place}: {first['msg'].lower()}") from None
    if problem := problem_of(manifest):
        raise CheckpointError(f"{source}: {problem}")
    return manifest

"""The checkpoint format: `manifest.json` and its validation.

Pure functions. The manifest lists the files of a checkpoint and the rectangles of tensors in them, with sizes and
checksums. It is written last, so a directory is a checkpoint if and only if its manifest is valid. Manifests of earlier
releases load.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from engine.checkpoint.rectangles import covers_exactly
from engine.errors import CheckpointError
from engine.parallel.table import Rectangle

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

MANIFEST = "manifest.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_DIRECTORY = "tokenizer"
_SHARD_NAME = re.compile(r"state-\d{5}-of-\d{5}\.safetensors")
_TOKENIZER_FILE = re.compile(rf"{TOKENIZER_DIRECTORY}/(?!\.\.?$)[^/\0]+")


def entry_key(kind: str, name: str, rectangle: Rectangle) -> str:
    """Return the key of a rectangle in its safetensors file: `param/model.norm.weight/0`."""
    return f"{kind}/{name}/{','.join(map(str, rectangle.start))}"


def shard_name(rank: int, world_size: int) -> str:
    """Return the name of the file to which `rank` writes its rectangles."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Best:
    """The evaluation with the lowest loss so far. `worse` counts the evaluations since then."""

    step: NonNegativeInt
    loss: float
    worse: NonNegativeInt


@dataclass(frozen=True)
class State:
    """The state of a run apart from its tensors.

    Attributes:
        step: completed optimizer steps.
        consumed_samples: consumed samples; also the number of the next one.
        consumed_tokens: consumed tokens.
        data_fingerprint: hash of the data and their order; empty for imported weights.
        data_contents: hashes of the contents of each dataset, by name; empty for imported weights.
        layout: the layout that wrote the checkpoint; informational, loading ignores it.
        best: None if evaluations are not compared.
        imported: of imported weights, the ids of special tokens in `config.json` and, without tokenizer files, the
            object in `generation_config.json`, by name; an export uses them where no tokenizer says otherwise.
    """

    step: NonNegativeInt
    consumed_samples: NonNegativeInt
    consumed_tokens: NonNegativeInt
    data_fingerprint: str
    layout: dict[str, JsonValue]
    best: Best | None = None
    imported: dict[str, JsonValue] = field(default_factory=dict)
    data_contents: dict[str, list[str]] = field(default_factory=dict)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredFile(_Stored):
    """Size in bytes and hash of a file."""

    size: NonNegativeInt
    xxh3_64: str = Field(pattern="^[0-9a-f]{16}$")


class StoredRectangle(_Stored):
    """A rectangle of a tensor: file and key, position in the tensor, and the hash of the values before the write."""

    file: str
    key: str
    start: tuple[NonNegativeInt, ...]
    extent: tuple[PositiveInt, ...]
    xxh3_64: str = Field(pattern="^[0-9a-f]{16}$")

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.start, self.extent)


class StoredTensor(_Stored):
    """Global shape and dtype of a tensor, and the rectangles that contain every element exactly once."""

    shape: tuple[PositiveInt, ...]
    dtype: DtypeName
    rectangles: tuple[StoredRectangle, ...]


class Manifest(_Stored):
    """The table of contents of a checkpoint directory.

    `save_number` counts the saves of a run directory; it orders checkpoints even if a run resumed from an earlier step.
    """

    format_version: Literal[1] = 1
    save_number: PositiveInt
    state: State
    files: dict[str, StoredFile]
    tensors: dict[str, dict[str, StoredTensor]]


def problem_of(manifest: Manifest) -> str | None:
    """Return up to three contradictions in a manifest, or None. Checked before each commit and after each read."""
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
    """Check that no file lists more bytes than its size; this also bounds the memory that a reader allocates."""
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
    """Return the bytes of `manifest.json`: the manifest and the hash of its bytes, which detects any changed byte."""
    body = manifest.model_dump_json().encode()
    return _PREFIX + xxhash.xxh3_64_hexdigest(body).encode() + _MIDDLE + body + _SUFFIX


def decode_manifest(content: bytes, source: str) -> Manifest:
    """Parse and validate the bytes of a `manifest.json`; the inverse of `encode_manifest`.

    Raises:
        CheckpointError: naming `source` and the problem.
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

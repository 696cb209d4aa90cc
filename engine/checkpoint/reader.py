"""Reads one checkpoint.

Opening a checkpoint validates the manifest and the size of every file. Tensors are verified when they are read, so a
rank verifies only what it loads.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint.manifest import (
    CONFIG_FILE,
    DTYPES,
    MANIFEST,
    TOKENIZER_DIRECTORY,
    State,
    StoredFile,
    StoredRectangle,
    StoredTensor,
    decode_manifest,
)
from engine.checkpoint.model_directory import ROW_BLOCK_BYTES, require_shapes
from engine.checkpoint.rectangles import (
    Shape,
    intersect,
    is_inside,
    relative,
    row_blocks,
    slice_notation,
    stop_of,
    whole,
)
from engine.checkpoint.safetensors_file import SafetensorsFile, file_hash, read_file, require_file
from engine.checkpoint.storage import tensor_bytes, tensor_hash
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.families import family_of
from engine.parallel.table import Rectangle

_MAX_MANIFEST_BYTES = 1 << 30


class Checkpoint:
    """An opened checkpoint directory with a valid manifest; a `ModelDirectory`.

    Raises:
        CheckpointError: a file is missing or has another size, or the manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_file(path / MANIFEST, _MAX_MANIFEST_BYTES)
        self.manifest = decode_manifest(content, str(path / MANIFEST))
        self._opened: dict[str, SafetensorsFile] = {}
        self._last: tuple[StoredRectangle, Tensor] | None = None
        for name, stored in self.manifest.files.items():
            size = require_file(path / name)
            if size != stored.size:
                raise CheckpointError(f"{path / name} is damaged: {size} bytes, expected {stored.size}")
            if not name.endswith(".safetensors"):
                self._check_hash(name, stored)

    @property
    def ignored(self) -> list[str]:
        """Nothing: all that a checkpoint has is used."""
        return []

    @property
    def state(self) -> State:
        return self.manifest.state

    @property
    def config_yaml_path(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory of tokenizer files; None for a tokenizer without files (bytes)."""
        path = self.path / TOKENIZER_DIRECTORY
        return path if path.is_dir() else None

    @property
    def tokenizer_spec(self) -> str | None:
        """The argument for `load_tokenizer`; None for an imported model without a tokenizer."""
        if self.tokenizer_dir:
            return str(self.tokenizer_dir)
        data = self._config.get("data")
        return data.get("tokenizer") if isinstance(data, dict) else None

    @property
    def model(self) -> ModelConfig:
        """The architecture, from the `model` section of config.yaml; other sections are not required.

        Raises:
            CheckpointError: the section is missing or invalid.
        """
        try:
            model = ModelConfig.model_validate(self._config.get("model"))
            family_of(model.family)
            return model
        except (ValidationError, ConfigError) as error:
            raise CheckpointError(f"{self.config_yaml_path}: no usable model section: {error}") from None

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            content = yaml.safe_load(self.config_yaml_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"cannot read {self.config_yaml_path}: {error}") from None
        return content if isinstance(content, dict) else {}

    def tensors(self, kind: str = "param") -> dict[str, Shape]:
        """Return names and global shapes of all tensors of a kind; empty if the checkpoint has none."""
        return {name: tensor.shape for name, tensor in self.manifest.tensors.get(kind, {}).items()}

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Check that the checkpoint belongs to a model with these tensors.

        Raises:
            CheckpointError: lists tensors that are missing, unexpected or of another shape.
        """
        require_shapes(self.tensors(), shapes, f"{self.path} belongs to another model:")

    def read(self, name: str, rectangle: Rectangle | None = None, *, kind: str = "param") -> Tensor:
        """Read a rectangle (default: all) of a tensor, independent of the stored rectangles; on the CPU, stored dtype.

        Args:
            kind: `param` (the fp32 master weights), `exp_avg`, `exp_avg_sq`, ...

        Raises:
            CheckpointError: no such tensor, or a damaged file; the message names it.
        """
        tensor = self._tensor(name, kind)
        wanted = rectangle or whole(tensor.shape)
        if not is_inside(tensor.shape, wanted):
            raise CheckpointError(
                f"{self.path}: {kind} of {name} has shape {list(tensor.shape)}, wanted {slice_notation(wanted)}"
            )
        out = torch.empty(wanted.extent, dtype=DTYPES[tensor.dtype])
        for stored in tensor.rectangles:
            if stored.rectangle == wanted:
                return self._load(stored)
            if shared := intersect(stored.rectangle, wanted):
                out[_slices(shared, wanted)].copy_(self._recent(stored)[_slices(shared, stored.rectangle)])
        return out

    def blocks(self, name: str, *, kind: str = "param") -> Iterator[Tensor]:
        """Read a whole tensor in blocks of rows, in order; each stored rectangle is read once, a few rows at a time.

        Raises:
            CheckpointError: as `read`; the checksums are compared after the last block.
        """
        tensor = self._tensor(name, kind)
        dtype = DTYPES[tensor.dtype]
        digests = [xxhash.xxh3_64() for _ in tensor.rectangles]
        for block in row_blocks(tensor.shape, ROW_BLOCK_BYTES // dtype.itemsize):
            out = torch.empty(block.extent, dtype=dtype)
            for stored, digest in zip(tensor.rectangles, digests, strict=True):
                if shared := intersect(stored.rectangle, block):
                    rows = self._open(stored.file).tensor(stored.key, relative(shared, stored.rectangle))
                    digest.update(tensor_bytes(rows))  # whole rows of the rectangle, in the order in which it is stored
                    if shared == block:
                        out = rows
                    else:
                        out[_slices(shared, block)].copy_(rows)
            yield out
        for stored, digest in zip(tensor.rectangles, digests, strict=True):
            self._require_hash(stored, digest.hexdigest())

    def verify(self, progress: Callable[[str, int], None] | None = None) -> None:
        """Hash every file and compare with the manifest. `progress` is called with each file and its size in bytes."""
        for name, stored in self.manifest.files.items():
            self._check_hash(name, stored)
            if progress:
                progress(name, stored.size)

    def _check_hash(self, name: str, stored: StoredFile) -> None:
        if file_hash(self.path / name) != stored.xxh3_64:
            raise CheckpointError(f"{self.path / name} is damaged: its checksum does not match the manifest")

    def _tensor(self, name: str, kind: str) -> StoredTensor:
        tensor = self.manifest.tensors.get(kind, {}).get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path} has no {kind} of {name}")
        return tensor

    def _recent(self, stored: StoredRectangle) -> Tensor:
        """Load a stored rectangle and cache it, because the next request is often for another part of it."""
        if self._last is None or self._last[0] != stored:
            self._last = None  # free it first
            self._last = stored, self._load(stored)
        return self._last[1]

    def _load(self, stored: StoredRectangle) -> Tensor:
        tensor = self._open(stored.file).tensor(stored.key)
        self._require_hash(stored, tensor_hash(tensor))
        return tensor

    def _require_hash(self, stored: StoredRectangle, found: str) -> None:
        if found != stored.xxh3_64:
            raise CheckpointError(f"{self.path / stored.file} is damaged: {stored.key} does not match its checksum")

    def _open(self, name: str) -> SafetensorsFile:
        if name not in self._opened:
            opened = SafetensorsFile(self.path / name)
            found = {key: (opened.dtype(key), opened.shape(key)) for key in opened.names}
            if found != self._listed(name):
                wrong = sorted(set(found.items()) ^ set(self._listed(name).items()))[0][0]
                raise CheckpointError(f"{self.path / name} does not hold what the manifest lists: {wrong}")
            self._opened[name] = opened
        return self._opened[name]

    def _listed(self, file: str) -> dict[str, tuple[str, Shape]]:
        """Return key, dtype and shape of the tensors that the manifest lists for a file."""
        return {
            stored.key: (tensor.dtype, stored.extent)
            for tensors in self.manifest.tensors.values()
            for tensor in tensors.values()
            for stored in tensor.rectangles
            if stored.file == file
        }


def _slices(part: Rectangle, box: Rectangle) -> tuple[slice, ...]:
    """Return the index of `part` in a tensor with the contents of `box`."""
    inside = relative(part, box)
    return tuple(slice(first, stop) for first, stop in zip(inside.start, stop_of(inside), strict=True))

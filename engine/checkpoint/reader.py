"""Finding and reading checkpoints.

A directory counts when its manifest holds and every file has its size; tensors are verified whenever they are read, so
that a rank pays only for what it loads. Rejected: trusting the name in `latest`, which a crash can leave behind.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint import rectangles as fmt
from engine.checkpoint.rectangles import Rectangle, Shape, State, StoredFile, StoredRectangle
from engine.checkpoint.storage import SafetensorsFile, file_hash, read_file, require_file, tensor_hash
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError

MANIFEST = "manifest.json"
BEST = "best"
PARTIAL = ".partial"
PREVIOUS = ".previous"
_STEP_NAME = re.compile(rf"step_\d{{8,}}({re.escape(PREVIOUS)})?")
_MAX_MANIFEST_BYTES = 1 << 30

Report = Callable[[str], None]


def warn(message: str) -> None:
    """Where reports go unless the caller wants them elsewhere."""
    print(f"checkpoint: {message}", file=sys.stderr, flush=True)


class Checkpoint:
    """A checkpoint directory with a manifest that holds. Tensors are verified when they are read.

    Raises:
        CheckpointError: a file is missing, has another size, or the manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_file(path / MANIFEST, _MAX_MANIFEST_BYTES)
        self.manifest = fmt.decode_manifest(content, str(path / MANIFEST))
        self._opened: dict[str, SafetensorsFile] = {}
        self._last: tuple[StoredRectangle, Tensor] | None = None
        for name, stored in self.manifest.files.items():
            size = require_file(path / name)
            if size != stored.size:
                raise CheckpointError(f"{path / name} is damaged: {size} bytes, expected {stored.size}")
            if not name.endswith(".safetensors"):
                self._check_hash(name, stored)

    @property
    def state(self) -> State:
        return self.manifest.state

    @property
    def config_yaml_path(self) -> Path:
        return self.path / fmt.CONFIG_FILE

    @property
    def tokenizer_dir(self) -> Path | None:
        """None for a run whose tokenizer has no files (bytes)."""
        path = self.path / fmt.TOKENIZER_DIRECTORY
        return path if path.is_dir() else None

    @property
    def tokenizer_spec(self) -> str | None:
        """What to give `load_tokenizer`; None for an imported model that came without a tokenizer."""
        if self.tokenizer_dir:
            return str(self.tokenizer_dir)
        data = self._config().get("data")
        return data.get("tokenizer") if isinstance(data, dict) else None

    def model_config(self) -> ModelConfig:
        """The architecture, from the `model` section of config.yaml; other sections need not be there."""
        try:
            return ModelConfig.model_validate(self._config().get("model"))
        except ValidationError as error:
            raise CheckpointError(f"{self.config_yaml_path}: no usable model section: {error}") from None

    def _config(self) -> dict[str, Any]:
        try:
            content = yaml.safe_load(self.config_yaml_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"cannot read {self.config_yaml_path}: {error}") from None
        return content if isinstance(content, dict) else {}

    def tensors(self, kind: str) -> dict[str, Shape]:
        """Names and global shapes of all tensors of a kind; empty when the checkpoint has none."""
        return {name: tensor.shape for name, tensor in self.manifest.tensors.get(kind, {}).items()}

    def require(self, kind: str, shapes: Mapping[str, Shape]) -> None:
        """Make sure that the checkpoint is of this model.

        Raises:
            CheckpointError: listing what is missing, unexpected or of another shape.
        """
        problems = fmt.differences(self.tensors(kind), shapes)
        if problems:
            more = [f"and {len(problems) - 10} more"] * (len(problems) > 10)
            lines = "\n  ".join([f"{self.path} is of another model ({kind}):", *problems[:10], *more])
            raise CheckpointError(lines)

    def read(self, kind: str, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """A rectangle (default: all) of a tensor, whatever rectangles it was stored in; on the CPU, as stored.

        Raises:
            CheckpointError: no such tensor, or a damaged file, which is named.
        """
        tensor = self.manifest.tensors.get(kind, {}).get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path} has no {kind} of {name}")
        wanted = rectangle or Rectangle((0,) * len(tensor.shape), tensor.shape)
        if not fmt.is_inside(tensor.shape, wanted):
            raise CheckpointError(
                f"{self.path}: {kind} of {name} has shape {list(tensor.shape)}, wanted {fmt.describe(wanted)}"
            )
        out = torch.empty(wanted.extent, dtype=fmt.DTYPES[tensor.dtype])
        for stored in tensor.rectangles:
            if stored.rectangle == wanted:
                return self._load(stored)
            if shared := fmt.intersect(stored.rectangle, wanted):
                out[_slices(shared, wanted)].copy_(self._recent(stored)[_slices(shared, stored.rectangle)])
        return out

    def verify(self, progress: Callable[[str, int], None] | None = None) -> None:
        """Read everything and compare it with the manifest. `progress` is told each file and its size when done."""
        for name, stored in self.manifest.files.items():
            self._check_hash(name, stored)
            if progress:
                progress(name, stored.size)

    def _check_hash(self, name: str, stored: StoredFile) -> None:
        if file_hash(self.path / name) != stored.xxh3_64:
            raise CheckpointError(f"{self.path / name} is damaged: its checksum does not match the manifest")

    def _recent(self, stored: StoredRectangle) -> Tensor:
        """A stored rectangle; the last one is kept, because its neighbours are usually asked for next."""
        if self._last is None or self._last[0] != stored:
            self._last = None  # free it first
            self._last = stored, self._load(stored)
        return self._last[1]

    def _load(self, stored: StoredRectangle) -> Tensor:
        tensor = self._open(stored.file).tensor(stored.key)
        if tensor_hash(tensor) != stored.xxh3_64:
            raise CheckpointError(f"{self.path / stored.file} is damaged: {stored.key} does not match its checksum")
        return tensor

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
        """Key, dtype and shape of what the manifest says to be in a file."""
        return {
            stored.key: (tensor.dtype, stored.extent)
            for tensors in self.manifest.tensors.values()
            for tensor in tensors.values()
            for stored in tensor.rectangles
            if stored.file == file
        }


def _slices(part: Rectangle, whole: Rectangle) -> tuple[slice, ...]:
    """Where `part` lies in a tensor that holds `whole`."""
    starts = [first - origin for first, origin in zip(part.start, whole.start, strict=True)]
    return tuple(slice(first, first + count) for first, count in zip(starts, part.extent, strict=True))


def checkpoints_dir(run_dir: Path | str) -> Path:
    return Path(run_dir) / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def candidates(run_dir: Path | str, report: Report = warn) -> list[Checkpoint]:
    """All valid checkpoints of a run, newest first. What is damaged is reported and passed over.

    A list with more than one lets a reader that meets a damaged tensor go back to the one before.

    Raises:
        CheckpointError: there is something, and none of it is a valid checkpoint.
    """
    root = checkpoints_dir(run_dir)
    problems: list[str] = []
    found = valid_checkpoints(root, problems.append)
    if not found and _latest(root) is not None:
        problems.append(f"{root / 'latest'} says {_latest(root)!r}, which is not there")
    newest_first = sorted(found, key=lambda checkpoint: -checkpoint.manifest.save_number)
    if problems and not found:
        raise CheckpointError("\n  ".join([f"no valid checkpoint in {root}:", *problems]))
    for problem in problems:
        report(f"passed over: {problem}")
    if newest_first and _latest(root) != newest_first[0].path.name:
        report(f"{root / 'latest'} says {_latest(root)!r}; the newest valid checkpoint is {newest_first[0].path.name}")
    return newest_first


def find(run_dir: Path | str, report: Report = warn) -> Checkpoint | None:
    """The newest valid checkpoint of a run; None when it never committed one.

    Raises:
        CheckpointError: there is something, and none of it is a valid checkpoint.
    """
    return next(iter(candidates(run_dir, report)), None)


def open_checkpoint(path: Path | str, report: Report = warn) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run directory `path` or of its `checkpoints`. Behind either of
    these, `best` is the one with the best evaluation.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.name == BEST and not path.exists():
        return _best(path.parent, report)
    if not path.is_dir():
        raise CheckpointError(f"no such checkpoint directory: {path}")
    if (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        return Checkpoint(path)
    inside = path.name == "checkpoints" and not checkpoints_dir(path).is_dir()
    found = find(path.parent if inside else path, report)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint: neither {MANIFEST} nor a committed checkpoints/step_*")
    return found


def _best(root: Path, report: Report) -> Checkpoint:
    """That of the best evaluation, as the newest checkpoint knows it."""
    newest = open_checkpoint(root, report)
    best = newest.state.best
    if best is None or not (newest.path.parent / step_name(best.step)).is_dir():
        why = "evaluations were not compared" if best is None else f"that of step {best.step} was not kept"
        raise CheckpointError(f"{root / BEST}: {why}; see checkpoint.keep_best, or name another checkpoint in {root}")
    return Checkpoint(newest.path.parent / step_name(best.step))


def valid_checkpoints(root: Path, problem: Report = lambda _: None) -> list[Checkpoint]:
    """Every entry of `root` that is a valid checkpoint, by name; `problem` hears about the others."""
    valid = []
    for name in sorted(os.listdir(root)) if root.is_dir() else []:
        if name == "latest" or name.endswith(PARTIAL):
            continue
        if not _STEP_NAME.fullmatch(name):
            problem(f"{root / name} is not a checkpoint")
            continue
        try:
            valid.append(Checkpoint(root / name))
        except CheckpointError as error:
            problem(str(error))
    return valid


def _latest(root: Path) -> str | None:
    try:
        return (root / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None

"""What a directory that holds a model offers, in whatever format: a checkpoint of ours or a Hugging Face directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine.checkpoint.rectangles import Shape
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError
from engine.parallel.table import Rectangle

OnTensor = Callable[[str, int], None]
"""Told the name and the number of elements of every weight when it is copied."""


class ModelDirectory(Protocol):
    """A model on disk, opened: its architecture, its weights by Hugging Face name, its tokenizer."""

    @property
    def path(self) -> Path: ...

    @property
    def model(self) -> ModelConfig:
        """The architecture."""

    @property
    def tokenizer_spec(self) -> str | None:
        """The argument for `load_tokenizer`; None where the model came without a tokenizer."""

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Raises CheckpointError unless the weights are exactly these, by name and shape."""

    def read(self, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """A rectangle (default: all) of a weight, on the CPU, in the dtype that is stored.

        Raises:
            CheckpointError: no such weight, or a damaged file.
        """


def with_progress(source: ModelDirectory, progress: OnTensor | None) -> Callable[[str], Tensor]:
    """`source.read` of whole weights, of each of which `progress` is told."""

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if progress:
            progress(name, tensor.numel())
        return tensor

    return read


def require_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], title: str) -> None:
    """Make sure that tensors are the expected ones.

    Raises:
        CheckpointError: `title`, and the first ten that are missing, unexpected or of another shape, one a line.
    """
    if problems := differences(found, expected):
        more = [f"and {len(problems) - 10} more"] * (len(problems) > 10)
        raise CheckpointError("\n  ".join([title, *problems[:10], *more]))


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """How the tensors `found` differ from `expected`, one line each: missing, unexpected, then of another shape."""
    missing = [f"{name}: missing, expected shape {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name}: unexpected, shape {list(found[name])}" for name in found if name not in expected]
    mismatched = [
        f"{name}: shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing + unexpected + mismatched

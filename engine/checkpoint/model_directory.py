"""The interface of directories with a model: checkpoints and Hugging Face directories."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine.checkpoint.rectangles import Shape
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError
from engine.parallel.table import Rectangle

ROW_BLOCK_BYTES = 2 << 20

OnTensor = Callable[[str, int], None]
"""Called with the name and the number of elements of each weight after it is read."""


class ModelDirectory(Protocol):
    """An opened model on disk: its architecture, its weights by Hugging Face name, its tokenizer."""

    @property
    def path(self) -> Path: ...

    @property
    def model(self) -> ModelConfig:
        """The architecture."""

    @property
    def ignored(self) -> list[str]:
        """Descriptions of what is there and not used."""

    @property
    def tokenizer_spec(self) -> str | None:
        """The argument for `load_tokenizer`; None if the model has no tokenizer."""

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Raise CheckpointError unless the weights have exactly these names and shapes."""

    def read(self, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """Read a rectangle (default: all) of a weight, on the CPU, in the stored dtype.

        Raises:
            CheckpointError: no such weight, or a damaged file.
        """

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Read a whole weight in blocks of rows, in order, each of about ROW_BLOCK_BYTES.

        Raises:
            CheckpointError: as `read`; a checkpoint's hash of the weight is compared after its last block.
        """


def with_progress(source: ModelDirectory, progress: OnTensor | None) -> Callable[[str], Iterator[Tensor]]:
    """Return `source.blocks`, calling `progress` after the last block of each weight."""

    def blocks(name: str) -> Iterator[Tensor]:
        elements = 0
        for block in source.blocks(name):
            elements += block.numel()
            yield block
        if progress:
            progress(name, elements)

    return blocks


def require_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], title: str) -> None:
    """Check that the tensors are the expected ones.

    Raises:
        CheckpointError: `title`, then the first ten that are missing, unexpected or of another shape, one per line.
    """
    if problems := differences(found, expected):
        more = [f"and {len(problems) - 10} more"] * (len(problems) > 10)
        raise CheckpointError("\n  ".join([title, *problems[:10], *more]))


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Return the differences of `found` from `expected`, one line each: missing, unexpected, then other shapes."""
    missing = [f"{name}: missing, expected shape {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name}: unexpected, shape {list(found[name])}" for name in found if name not in expected]
    mismatched = [
        f"{name}: shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing + unexpected + mismatched

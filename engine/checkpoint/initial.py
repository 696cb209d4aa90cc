"""Weights to start from: those of a Hugging Face directory, or of a checkpoint of any layout, and nothing else of it.

Each rank reads only the rectangles that it holds.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.manager import Checkpoint, open_checkpoint
from engine.checkpoint.rectangles import Rectangle, Shape
from engine.config.schema import SOURCES, ModelConfig


class InitialWeights:
    """A trained model, opened.

    Args:
        kind: `from_hf` or `from_checkpoint`.
        path: the directory.

    Raises:
        CheckpointError: there is none, it is damaged or refused.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.path = path
        self._source: HuggingFaceDirectory | Checkpoint = (
            HuggingFaceDirectory(path) if kind == "from_hf" else open_checkpoint(path)
        )

    @property
    def model(self) -> ModelConfig:
        source = self._source
        return source.model if isinstance(source, HuggingFaceDirectory) else source.model_config()

    @property
    def tokenizer(self) -> str | None:
        """What to give `load_tokenizer`; None where the model came without one."""
        source = self._source
        if isinstance(source, Checkpoint):
            return source.tokenizer_spec
        return str(self.path) if source.tokenizer_files else None

    def require(self, shapes: dict[str, Shape]) -> None:
        """Raises CheckpointError unless the tensors are exactly these."""
        if isinstance(self._source, Checkpoint):
            self._source.require("param", shapes)
        else:
            self._source.require(shapes)

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """A rectangle of a tensor, as it is stored."""
        if isinstance(self._source, Checkpoint):
            return self._source.read("param", name, rectangle)
        return self._source.read(name, rectangle)


def initial_weights(model: ModelConfig) -> InitialWeights | None:
    """Those that `model.from_hf` or `model.from_checkpoint` names; None for a model from scratch."""
    if model.from_hf is not None:
        return InitialWeights("from_hf", model.from_hf)
    return None if model.from_checkpoint is None else InitialWeights("from_checkpoint", model.from_checkpoint)


def trained(kind: str, path: Path) -> tuple[dict[str, Any], str | None]:
    """Model fields and tokenizer of a trained model, for `engine.config.load`."""
    weights = InitialWeights(kind, path)
    return weights.model.model_dump(mode="json", exclude=set(SOURCES)), weights.tokenizer

"""Opens a directory with a model, by its content or by the setting that names it.

Through a `ModelDirectory`, each rank reads only the rectangles that it needs.
"""

from pathlib import Path
from typing import Any

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.files import CONFIG
from engine.checkpoint.manifest import MANIFEST
from engine.checkpoint.model_directory import ModelDirectory
from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import SOURCES, ModelConfig


def open_model(path: Path) -> ModelDirectory:
    """Open the model of a run (its newest checkpoint), of a checkpoint, or of a Hugging Face directory.

    Raises:
        CheckpointError: there is no model, or it is damaged or rejected.
    """
    exported = (path / CONFIG).exists() and not (path / MANIFEST).exists()
    return HuggingFaceDirectory(path) if exported else open_checkpoint(path)


def initial_weights(model: ModelConfig) -> ModelDirectory | None:
    """Open the model that `model.from_hf` or `model.from_checkpoint` names; None to train from scratch.

    Raises:
        CheckpointError: there is no model, or it is damaged or rejected.
    """
    if model.from_hf is not None:
        return HuggingFaceDirectory(model.from_hf)
    return None if model.from_checkpoint is None else open_checkpoint(model.from_checkpoint)


def trained(kind: str, path: Path) -> tuple[dict[str, Any], str | None]:
    """Return model fields and tokenizer of a trained model, for `engine.config.load`.

    Args:
        kind: `from_hf` or `from_checkpoint`.

    Raises:
        CheckpointError: there is no model, or it is damaged or rejected.
    """
    source: ModelDirectory = HuggingFaceDirectory(path) if kind == "from_hf" else open_checkpoint(path)
    return source.model.model_dump(mode="json", exclude=set(SOURCES)), source.tokenizer_spec

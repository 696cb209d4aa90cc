"""Imports a Hugging Face directory to a run directory: copies tensor by tensor, with the same names and shapes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import yaml

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.generation_config import imported_ids
from engine.checkpoint.manifest import State
from engine.checkpoint.model_directory import OnTensor, with_progress
from engine.checkpoint.rectangles import Shape, whole
from engine.checkpoint.save import save
from engine.checkpoint.shares import StateSlice
from engine.checkpoint.storage import new_directory
from engine.errors import CheckpointError, StorageError


def import_directory(
    source: HuggingFaceDirectory, run_dir: Path | str, shapes: Mapping[str, Shape], progress: OnTensor | None = None
) -> Path:
    """Create a run directory whose checkpoint at step 0 contains the weights as fp32 masters and no optimizer state.

    Its config.yaml has only a `model` section; the next run sets data, batch and schedule.

    Args:
        shapes: names and shapes that `source.model` implies, in model order.
        progress: called after each tensor.

    Returns:
        the checkpoint directory.

    Raises:
        CheckpointError: the tensors have other names or shapes, or values that are not finite; nothing is left.
        ConfigError: `run_dir` exists and is not empty.
    """
    source.require(shapes)
    blocks = with_progress(source, progress)
    slices = [
        StateSlice("param", name, shape, whole(shape), partial(blocks, name), dtype=torch.float32)
        for name, shape in shapes.items()
    ]
    imported = imported_ids(source.config, source.model.vocab_size)
    if not source.tokenizer_files and (generation := source.generation_config()):
        imported["generation_config"] = generation
    state = State(0, 0, 0, "", {"imported": str(source.path)}, imported=imported)
    with new_directory(Path(run_dir)) as target:
        try:
            checkpoint = save(
                target,
                slices,
                state,
                config_yaml=yaml.safe_dump({"model": source.model.model_dump(mode="json")}, sort_keys=False),
                tokenizer_files=source.tokenizer_files,
                keep_last=1,
                rank=0,
                world_size=1,
                first_problem=lambda problem: problem,
            )
        except StorageError as error:
            if isinstance(error.__cause__, CheckpointError):  # of the source
                raise error.__cause__ from None
            raise
    return Path(run_dir) / checkpoint.relative_to(target)

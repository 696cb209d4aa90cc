"""A small model as a checkpoint and as a Hugging Face directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.huggingface.importing import import_directory
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.shares import StateSlice
from engine.config.schema import ModelConfig
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from engine.parallel.table import Rectangle
from tests.checkpoint.checkpoint_cases import save_step

TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<end>": 2}, "unk_token": "a"},
    "added_tokens": [
        {"id": 2, "content": "<end>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ],
}
TINY = ModelConfig(**{**PRESETS["tiny"], "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8})


def import_(source: Path, run_dir: Path) -> Checkpoint:
    directory = HuggingFaceDirectory(source)
    return Checkpoint(import_directory(directory, run_dir, logical_shapes(directory.model)))


def export_(checkpoint: Checkpoint, out: Path, **settings: Any) -> Path:
    return export(checkpoint, None, out, logical_shapes(checkpoint.model), **settings)


def tiny_checkpoint(run_dir: Path, model: ModelConfig = TINY, tokenizer: str | None = None) -> Checkpoint:
    """Random weights of `model`, as a training run would leave them."""
    generator = torch.Generator().manual_seed(0)

    def owned(seed: int, rank: int, world_size: int) -> list[StateSlice]:
        return [
            StateSlice(kind, name, shape, Rectangle((0,) * len(shape), shape), torch.randn(shape, generator=generator))
            for kind in ("param", "exp_avg", "exp_avg_sq")
            for name, shape in logical_shapes(model).items()
        ]

    sections: dict[str, Any] = {"model": model.model_dump(mode="json"), "data": {"tokenizer": tokenizer}}
    (result,) = save_step(run_dir, 5, owned=owned, config_yaml=json.dumps(sections))
    assert isinstance(result, Path), result
    return Checkpoint(result)


def edit_weights(hf: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, hf / "model.safetensors")


def write_word_tokenizer(path: Path) -> Path:
    """A tokenizer of three words in the directory `path`."""
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return path

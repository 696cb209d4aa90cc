"""A model ready to be used, from whatever directory holds one."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint.huggingface import HuggingFaceDirectory
from engine.checkpoint.manager import open_checkpoint
from engine.config import ModelConfig
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import CheckpointError
from engine.model.decoder import Decoder
from engine.model.parameters import logical_shapes, parameter_table


def load_decoder(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[Decoder, Tokenizer]:
    """The decoder and the tokenizer of a run (its newest checkpoint), a checkpoint or a Hugging Face directory.

    Raises:
        CheckpointError: there is no model, it is damaged, or it comes without a tokenizer.
    """
    if (path / "config.json").exists() and not (path / "manifest.json").exists():
        source = HuggingFaceDirectory(path)
        source.require(logical_shapes(source.model))
        tokenizer = load_tokenizer(str(path)) if source.tokenizer_files else None
        decoder = _build(source.model, source.read, dtype, device)
    else:
        checkpoint = open_checkpoint(path)
        model, spec = checkpoint.model_config(), checkpoint.tokenizer_spec
        checkpoint.require("param", logical_shapes(model))
        tokenizer = load_tokenizer(spec) if spec else None
        decoder = _build(model, lambda name: checkpoint.read("param", name), dtype, device)
    if tokenizer is None:
        raise CheckpointError(f"{path} holds a model but no tokenizer; put its tokenizer files beside it")
    return decoder, tokenizer


@torch.no_grad()
def _build(model: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device) -> Decoder:
    parameters = {}
    for parameter in parameter_table(model).parameters:
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        for tensor, part in parameter.split(values):
            part.copy_(read(tensor.name))
        parameters[parameter.path] = nn.Parameter(values, requires_grad=False)
    return Decoder(model, parameters)

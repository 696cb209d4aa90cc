"""Loads a decoder and its tokenizer from any directory with a model."""

from pathlib import Path

import torch
from torch import nn

from engine.checkpoint.model_directory import ModelDirectory
from engine.checkpoint.opening import open_model
from engine.config.schema import ModelConfig
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import logical_shapes, parameter_table, tp_problem, whole_model
from engine.parallel.layout import NO_TP, TensorParallel


def load_decoder(
    path: Path, dtype: torch.dtype, device: torch.device, tp: TensorParallel = NO_TP
) -> tuple[Decoder, Tokenizer]:
    """Load decoder and tokenizer of a run (its newest checkpoint), a checkpoint or a Hugging Face directory.

    With `tp`, only this rank's shards of the parameters are read.

    Raises:
        CheckpointError: there is no model, it is damaged, or it has no tokenizer.
        ConfigError: the layers cannot be sharded over `tp.size` ranks.
    """
    source = open_model(path)
    source.require(logical_shapes(source.model))
    if source.tokenizer_spec is None:
        raise CheckpointError(f"{path} holds a model but no tokenizer; put its tokenizer files next to it")
    tokenizer = load_tokenizer(source.tokenizer_spec)
    return build_decoder(source, dtype, device, tp), tokenizer


@torch.no_grad()
def build_decoder(
    source: ModelDirectory, dtype: torch.dtype, device: torch.device, tp: TensorParallel = NO_TP
) -> Decoder:
    """Create a decoder with the weights of `source`, which has exactly those of its model.

    Raises:
        ConfigError: the layers cannot be sharded over `tp.size` ranks.
    """
    model = source.model
    _require_tp(model, tp.size)
    parameters = {}
    for parameter in parameter_table(model, tp=tp).parameters:
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        for tensor, part in parameter.split(values):
            part.copy_(source.read(tensor.name, tensor.rectangle))
        parameters[parameter.path] = nn.Parameter(values, requires_grad=False)
    return Decoder(model, Parameters(parameters), whole_model(model), tp)


def _require_tp(model: ModelConfig, tp: int) -> None:
    if problem := tp_problem(model, tp):
        works = ", ".join(str(n) for n in range(1, model.num_heads + 1) if not tp_problem(model, n))
        raise ConfigError(
            f"the layers cannot be sharded over {tp} ranks: {tp} {problem}; the number of ranks (--nproc-per-node) can "
            f"be {works}"
        )

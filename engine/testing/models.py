"""Small models for tests."""

import torch
from torch import nn

from engine.config.schema import ModelConfig
from engine.model.decoder import Decoder
from engine.model.families import PRESETS
from engine.model.layers import Parameters
from engine.model.parameters import parameter_table
from engine.parallel.table import initialize


def tiny_config(preset: str = "tiny", **changes: object) -> ModelConfig:
    """Return a preset with some fields changed."""
    return ModelConfig(**{**PRESETS[preset], **changes})


def new_parameters(model: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Return initialized parameters by path, each a separate tensor."""
    parameters = {}
    for parameter in parameter_table(model).parameters:
        values = torch.empty(parameter.shape, dtype=dtype)
        initialize(parameter, values, seed)
        parameters[parameter.path] = nn.Parameter(values)
    return parameters


def new_decoder(model: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    """A whole decoder with initialized parameters, on the CPU."""
    return Decoder(model, Parameters(new_parameters(model, seed, dtype)))


def logical_state(model: ModelConfig, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the logical tensors of `parameters`, by Hugging Face name."""
    return _logical(model, {path: parameter.detach() for path, parameter in parameters.items()})


def logical_gradients(model: ModelConfig, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the gradients of the logical tensors, by Hugging Face name."""
    return _logical(model, {path: parameter.grad for path, parameter in parameters.items()})  # type: ignore[misc]


def _logical(model: ModelConfig, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        tensor.name: part
        for parameter in parameter_table(model).parameters
        for tensor, part in parameter.split(values[parameter.path])
    }

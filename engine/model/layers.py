"""Modules that hold parameters: linear, norm and embedding.

A module takes its tensors out of a mapping from path to parameter, so that shapes are stated once (in the parameter
table) and the same modules run on views of training buffers and on tensors read from a file.
"""

from collections.abc import Mapping

import torch
from torch import nn

from engine.ops.linear import linear
from engine.ops.norm import layer_norm, rms_norm

Parameters = Mapping[str, nn.Parameter]


class Linear(nn.Module):
    """`x @ weight.T + bias`; the bias exists where the table has one."""

    def __init__(self, parameters: Parameters, path: str) -> None:
        super().__init__()
        self.weight = parameters[f"{path}.weight"]
        self.bias = parameters.get(f"{path}.bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the table has a bias for it."""

    def __init__(self, parameters: Parameters, path: str, eps: float) -> None:
        super().__init__()
        self.weight = parameters[f"{path}.weight"]
        self.bias = parameters.get(f"{path}.bias")
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)

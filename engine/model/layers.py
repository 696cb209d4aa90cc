"""Modules that hold parameters: linear layers, norm, embedding and head, and the two pairs that a block is made of.

A module takes its tensors out of `Parameters` by path, so that shapes are stated once (in the parameter table) and the
same modules run on views of training buffers and on tensors read from a file. `tp` says with whom the layer is shared;
alone, all of them are plain.

A norm or an activation function and the linear layer behind it are one module, because the pair is what FP8 fuses (the
op writes its output in FP8 for the matmul) and what selective recompute works on (the op's output is discarded and
computed again from its input). The decoder knows of neither.

Legend: t tokens, h hidden size, f feed-forward size, v vocabulary; /tp: this rank's share.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema import ModelConfig, OpsConfig
from engine.ops.norm import add_norm, layer_norm, norm_to_fp8, rms_norm
from engine.ops.quantize import Fp8Output
from engine.ops.swiglu import swiglu, swiglu_to_fp8
from engine.parallel.fp8 import Fp8Layer
from engine.parallel.gradients import GradientSink
from engine.parallel.layout import TensorParallel
from engine.parallel.recompute import discard_and_recompute
from engine.parallel.tensor import (
    Activation,
    column_linear,
    row_linear,
    vocabulary_cross_entropy,
    vocabulary_embedding,
)


@dataclass(frozen=True)
class Parameters:
    """What the modules of a decoder are built from, under the paths of the parameter table.

    Attributes:
        tensors: the parameters that this rank holds.
        sinks: what takes their gradients, in training; without one a gradient goes to autograd.
        fp8: the scales of the layers whose matmuls are in FP8, under the paths of their weights.
    """

    tensors: Mapping[str, nn.Parameter]
    sinks: Mapping[str, GradientSink] = field(default_factory=dict)
    fp8: Mapping[str, Fp8Layer] = field(default_factory=dict)


class ColumnLinear(nn.Module):
    """`x @ weight.T + bias`, cut by output features: [t/tp, in] -> [t, out/tp]. A bias is there if the table has it."""

    def __init__(self, parameters: Parameters, path: str, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameters.tensors[f"{path}.weight"]
        self.bias = parameters.tensors.get(f"{path}.bias")
        self.sink = parameters.sinks.get(f"{path}.weight")
        self.fp8 = parameters.fp8.get(f"{path}.weight")
        self.tp = tp

    def forward(self, x: Activation) -> torch.Tensor:
        return column_linear(x, self.weight, self.bias, self.tp, self.sink, self.fp8)


class RowLinear(ColumnLinear):
    """`x @ weight.T + bias`, cut by input features: [t, in/tp] -> [t/tp, out]."""

    def forward(self, x: Activation) -> torch.Tensor:
        return row_linear(x, self.weight, self.bias, self.tp, self.sink, self.fp8)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the table has a bias for it."""

    def __init__(self, parameters: Parameters, path: str, eps: float, ops: OpsConfig) -> None:
        super().__init__()
        self.weight = parameters.tensors[f"{path}.weight"]
        self.bias = parameters.tensors.get(f"{path}.bias")
        sinks = (parameters.sinks.get(f"{path}.{name}") for name in ("weight", "bias"))
        self.weight_sink, self.bias_sink = (None if sink is None else sink.add for sink in sinks)
        self.eps, self.impl = eps, ops.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [..., h]."""
        sinks = (self.weight_sink, self.bias_sink)
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps, self.impl, sinks)
        return layer_norm(x, self.weight, self.bias, self.eps, self.impl, sinks)

    def fused(
        self, x: torch.Tensor, residual: torch.Tensor | None, output: Fp8Output | None
    ) -> tuple[Activation, torch.Tensor]:
        """The norm of x [t, h] (or of x + residual), and that sum; in FP8 if `output` says how."""
        sinks = (self.weight_sink, self.bias_sink)
        if output is not None:
            return norm_to_fp8(x, residual, self.weight, self.bias, self.eps, output, sinks)
        if residual is None:
            return self(x), x
        return add_norm(x, residual, self.weight, self.bias, self.eps, self.impl, sinks)


class NormLinear(nn.Module):
    """A norm and the column-parallel layer behind it: [t/tp, h] -> [t, out/tp] (Transformer Engine: LayerNormLinear).

    With `recompute` the output of the norm is not kept for the backward pass.
    """

    def __init__(
        self,
        parameters: Parameters,
        norm_path: str,
        path: str,
        model: ModelConfig,
        tp: TensorParallel,
        ops: OpsConfig,
        *,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.norm = Norm(parameters, norm_path, model.norm_eps, ops)
        self.linear = ColumnLinear(parameters, path, tp)
        self.recompute = recompute

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """linear(norm(x)), or of x + residual, which the norm adds in the same pass; and that sum."""
        normed, total = self.norm.fused(x, residual, self._fp8_output(x))
        with _discarded(normed, lambda: self.norm(total), self.recompute):
            return self.linear(normed), total

    def _fp8_output(self, x: torch.Tensor) -> Fp8Output | None:
        if self.linear.fp8 is None or self.recompute or self.norm.impl not in ("auto", "triaxis"):
            return None
        return self.linear.fp8.output_spec(x, x.shape[-1])


class ActivationLinear(nn.Module):
    """SwiGLU or GELU and the row-parallel layer behind it: [t, 2f/tp] (gate, then up) or [t, f/tp] -> [t/tp, h].

    With `recompute` the output of the activation function is not kept for the backward pass.
    """

    def __init__(
        self, parameters: Parameters, path: str, model: ModelConfig, tp: TensorParallel, *, recompute: bool
    ) -> None:
        super().__init__()
        self.gated = model.activation == "swiglu"
        self.linear = RowLinear(parameters, path, tp)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if output := self._fp8_output(x):
            return self.linear(swiglu_to_fp8(x, output))
        activated = self._activate(x)
        with _discarded(activated, lambda: self._activate(x), self.recompute):
            return self.linear(activated)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x) if self.gated else F.gelu(x, approximate="tanh")

    def _fp8_output(self, x: torch.Tensor) -> Fp8Output | None:
        if self.linear.fp8 is None or self.recompute or not self.gated:
            return None
        return self.linear.fp8.output_spec(x, x.shape[1] // 2)


class Embedding(nn.Module):
    """Tokens [t] -> hidden states [t/tp, h]."""

    def __init__(self, model: ModelConfig, parameters: Parameters, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameters.tensors["embedding.weight"]
        self.vocab_size, self.tp = model.vocab_size, tp

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return vocabulary_embedding(tokens, self.weight, self.vocab_size, self.tp)


class Head(nn.Module):
    """Final norm, projection to the vocabulary and loss."""

    def __init__(self, model: ModelConfig, parameters: Parameters, tp: TensorParallel, ops: OpsConfig) -> None:
        super().__init__()
        self.norm = Norm(parameters, "norm", model.norm_eps, ops)
        self.weight = parameters.tensors["embedding.weight" if model.tie_embeddings else "head.weight"]
        self.vocab_size, self.tp = model.vocab_size, tp

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        z_loss: float = 0.0,
        target_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss in nats, summed over the unmasked tokens; `x` [t/tp, h], `labels` and `loss_mask` [t]; `target_indices`:
        int64, the tokens that are not masked, where some are."""
        return vocabulary_cross_entropy(
            self.norm(x), self.weight, labels, loss_mask, self.vocab_size, self.tp, z_loss, target_indices
        )


def _discarded(
    activation: Activation, compute: Callable[[], torch.Tensor], recompute: bool
) -> AbstractContextManager[None]:
    """Where `recompute` is on, operations within keep `compute` instead of `activation`."""
    if not recompute:
        return nullcontext()
    assert isinstance(activation, torch.Tensor)
    return discard_and_recompute(activation, compute)

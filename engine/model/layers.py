"""Modules that hold parameters: linear layers, norm, embedding, head, and the two fused pairs of a block.

A module takes its tensors from `Parameters` by path, so that shapes are stated once (in the parameter table) and the
same modules run on views of training buffers and on tensors read from a file. `tp` is the tensor-parallel group; with
size 1 every module is an ordinary unsharded layer.

A norm or activation function and the linear layer that follows it form one module, because FP8 fuses the pair (the op
writes its output in FP8 for the matmul) and selective recompute works on it (the op's output is discarded and computed
again from its input). The decoder handles neither case.

Legend: t tokens, h hidden size, f feed-forward size, v vocabulary; /tp: sharded over the tensor-parallel ranks.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema import ModelConfig, OpsConfig
from engine.ops.cross_entropy import WeightSink
from engine.ops.linear import MATMUL_KINDS
from engine.ops.norm import add_norm, layer_norm, norm_for_fp8, rms_norm
from engine.ops.quantize import AmaxOutput, Fp8Output, GradHandover
from engine.ops.swiglu import geglu, swiglu, swiglu_for_fp8, swiglu_hands_over
from engine.parallel.fp8 import Fp8Quantizer
from engine.parallel.gradients import GradientSink, add_together
from engine.parallel.layout import TensorParallel
from engine.parallel.recompute import discard_and_recompute
from engine.parallel.tensor import (
    Activation,
    column_linear,
    row_linear,
    vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
)


@dataclass(frozen=True)
class Parameters:
    """This rank's parameters with their gradient sinks and FP8 quantizers, keyed by path in the parameter table.

    Attributes:
        tensors: the parameters.
        sinks: gradient accumulators, in training only; a parameter without one gets its `.grad` from autograd.
        quantizers: of the linear layers whose matmuls are in FP8, keyed by the path of the weight.
        onednn: kinds of fp32 matmuls on a CPU that oneDNN computes; see `matmul_transposed`.
    """

    tensors: Mapping[str, nn.Parameter]
    sinks: Mapping[str, GradientSink] = field(default_factory=dict)
    quantizers: Mapping[str, Fp8Quantizer] = field(default_factory=dict)
    onednn: frozenset[str] = MATMUL_KINDS


class ParallelLinear(nn.Module):
    """A linear layer sharded over the tensor-parallel ranks; it has a bias if the parameter table has one for it."""

    def __init__(self, parameters: Parameters, path: str, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameters.tensors[f"{path}.weight"]
        self.bias = parameters.tensors.get(f"{path}.bias")
        self.sink = parameters.sinks.get(f"{path}.weight")
        self.quantizer = parameters.quantizers.get(f"{path}.weight")
        self.tp, self.onednn = tp, parameters.onednn


class ColumnLinear(ParallelLinear):
    """`x @ weight.T + bias`, sharded by output features: [t/tp, in] -> [t, out/tp]."""

    def forward(self, x: Activation, handover: GradHandover | None = None) -> torch.Tensor:
        return column_linear(x, self.weight, self.bias, self.tp, self.sink, self.quantizer, handover, self.onednn)

    def grad_handover(self, x: torch.Tensor, supports: Callable[[Fp8Output | AmaxOutput], bool]) -> GradHandover | None:
        """How the op after this layer hands over the gradient of the layer's output; None if it does not.

        Args:
            x: a tensor of the device and dtype of the output.
            supports: whether the op can hand over a gradient as an output spec says.
        """
        output = None if self.quantizer is None else self.quantizer.grad_spec(x)
        if output is None or not supports(output):
            return None
        summed = isinstance(output, Fp8Output) and self.bias is not None  # the gradient of a bias needs the values
        return None if summed else GradHandover(output)


class RowLinear(ParallelLinear):
    """`x @ weight.T + bias`, sharded by input features: [t, in/tp] -> [t/tp, out]."""

    def forward(self, x: Activation) -> torch.Tensor:
        return row_linear(x, self.weight, self.bias, self.tp, self.sink, self.quantizer, self.onednn)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm if the parameter table has a bias for it."""

    def __init__(self, parameters: Parameters, path: str, model: ModelConfig, ops: OpsConfig) -> None:
        super().__init__()
        self.weight = parameters.tensors[f"{path}.weight"]
        self.bias = parameters.tensors.get(f"{path}.bias")
        names = (f"{path}.weight", f"{path}.bias")
        sinks = [parameters.sinks[name] for name in names if name in parameters.sinks]
        self.sink = partial(add_together, sinks) if sinks else None
        self.eps, self.impl, self.zero_centered = model.norm_eps, ops.norm, model.zero_centered_norm

    @property
    def factor(self) -> torch.Tensor:
        """What the normalized values are multiplied by: the weight, or 1 + weight in fp32."""
        return 1 + self.weight.float() if self.zero_centered else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize `x` [..., h] over its last dimension."""
        if self.bias is None:
            return rms_norm(x, self.factor, self.eps, self.impl, self.sink)
        return layer_norm(x, self.weight, self.bias, self.eps, self.impl, self.sink)

    def fused(
        self, x: torch.Tensor, residual: torch.Tensor | None, output: Fp8Output | AmaxOutput | None
    ) -> tuple[Activation, torch.Tensor]:
        """Normalize s = x + residual [t, h], or s = x without a residual. Return (normalized s, s), the first in FP8 or
        with its amax if `output` says so.
        """
        if output is not None:
            return norm_for_fp8(x, residual, self.weight, self.bias, self.eps, output, self.sink)
        if residual is None:
            return self(x), x
        return add_norm(x, residual, self.factor, self.bias, self.eps, self.impl, self.sink)


class NormLinear(nn.Module):
    """A norm followed by a column-parallel linear layer, [t/tp, h] -> [t, out/tp], as LayerNormLinear in Transformer
    Engine; only the linear layer in a model that normalizes outputs instead.

    With `selective_recompute` the output of the norm is not kept for the backward pass.
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
        selective_recompute: bool,
    ) -> None:
        super().__init__()
        self.norm = Norm(parameters, norm_path, model, ops) if model.norm_placement != "post" else None
        self.linear = ColumnLinear(parameters, path, tp)
        self.selective_recompute = selective_recompute

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, handover: GradHandover | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (linear(norm(s)), s) for s = x + residual (the add is fused into the norm), or s = x without one.
        `handover`: of the gradient of linear(norm(s)).
        """
        norm = self.norm
        if norm is None:
            total = x if residual is None else x + residual
            return self.linear(total, handover), total
        normed, total = norm.fused(x, residual, self._output(x, norm))
        with _discarded(normed, lambda: norm(total), self.selective_recompute):
            return self.linear(normed, handover), total

    def _output(self, x: torch.Tensor, norm: Norm) -> Fp8Output | AmaxOutput | None:
        """The FP8 output of the norm's kernel, which has no 1 + weight."""
        if self.linear.quantizer is None or self.selective_recompute:
            return None
        if norm.zero_centered or norm.impl not in ("auto", "triaxis"):
            return None
        return self.linear.quantizer.input_spec(x, x.shape[-1])


class Output(nn.Module):
    """What some models do to the output of attention or feed-forward, [t/tp, h], before it is added to the stream: a
    norm, a factor.
    """

    def __init__(self, parameters: Parameters, norm_path: str, model: ModelConfig, ops: OpsConfig) -> None:
        super().__init__()
        self.norm = Norm(parameters, norm_path, model, ops) if model.norm_placement != "pre" else None
        self.scale = model.residual_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.norm is None else self.norm(x)
        return x if self.scale == 1 else x * self.scale


class ActivationLinear(nn.Module):
    """SwiGLU, GeGLU or GELU followed by a row-parallel linear layer: [t, 2f/tp] (gate, then up) or [t, f/tp] ->
    [t/tp, h].

    With `selective_recompute` the output of the activation function is not kept for the backward pass.
    """

    def __init__(
        self, parameters: Parameters, path: str, model: ModelConfig, tp: TensorParallel, *, selective_recompute: bool
    ) -> None:
        super().__init__()
        self.activation = model.activation
        self.linear = RowLinear(parameters, path, tp)
        self.selective_recompute = selective_recompute

    def forward(self, x: torch.Tensor, handover: GradHandover | None = None) -> torch.Tensor:
        """`handover`: of the gradient of `x`."""
        if output := self._output(x):
            return self.linear(swiglu_for_fp8(x, output, handover))
        activated = self._activate(x, handover)
        with _discarded(activated, lambda: self._activate(x, None), self.selective_recompute):
            return self.linear(activated)

    def grad_handover(self, up: ColumnLinear, x: torch.Tensor) -> GradHandover | None:
        """Of the gradient of this module's input, the output of `up`; None without one. `x`: as for `up`."""
        if self.activation != "swiglu":
            return None
        return up.grad_handover(x, lambda output: swiglu_hands_over(output, up.weight.shape[0]))

    def _activate(self, x: torch.Tensor, handover: GradHandover | None) -> torch.Tensor:
        if self.activation == "swiglu":
            return swiglu(x, handover)
        return geglu(x) if self.activation == "geglu" else F.gelu(x, approximate="tanh")

    def _output(self, x: torch.Tensor) -> Fp8Output | AmaxOutput | None:
        if self.linear.quantizer is None or self.selective_recompute or self.activation != "swiglu":
            return None
        return self.linear.quantizer.input_spec(x, x.shape[1] // 2)


class Embedding(nn.Module):
    """Token embedding, multiplied by the model's factor in the dtype of the weight: [t] -> [t/tp, h]."""

    def __init__(self, model: ModelConfig, parameters: Parameters, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameters.tensors["embedding.weight"]
        self.sink = parameters.sinks.get("embedding.weight")
        self.vocab_size, self.tp = model.vocab_size, tp
        scale = model.embedding_scale
        # Gemma rounds its factor to the dtype of the weight
        rounded = torch.tensor(model.hidden_size**0.5, dtype=self.weight.dtype, device="cpu")
        self.scale = rounded.item() if scale == "sqrt_hidden" else scale

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = vocab_parallel_embedding(tokens, self.weight, self.vocab_size, self.tp, self.sink)
        return x if self.scale == 1 else x * self.scale


class Head(nn.Module):
    """Final norm, output projection and loss. What divides the logits divides the hidden states before them."""

    def __init__(self, model: ModelConfig, parameters: Parameters, tp: TensorParallel, ops: OpsConfig) -> None:
        super().__init__()
        self.norm = Norm(parameters, "norm", model, ops)
        path = "embedding.weight" if model.tie_embeddings else "head.weight"
        self.weight = parameters.tensors[path]
        # a tied weight is complete when the gradient of the embedding has arrived
        sink = parameters.sinks.get(path)
        arrived = None if sink is None or model.tie_embeddings else sink.arrived
        self.sink = None if sink is None else WeightSink(sink.add_in_forward, arrived)
        self.vocab_size, self.tp, self.onednn = model.vocab_size, tp, parameters.onednn
        self.scaling, self.softcap = model.logits_scaling, model.logits_softcap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, v/tp] for hidden states [t, h] before the final norm."""
        logits = F.linear(self._scaled(self.norm(hidden)), self.weight)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _scaled(self, normed: torch.Tensor) -> torch.Tensor:
        return normed if self.scaling == 1 else normed / self.scaling

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        z_loss: float = 0.0,
        target_indices: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Return `scale` times the loss in nats, summed over the unmasked tokens, fp32: for x + residual [t/tp, h],
        `labels` and `loss_mask` [t]. `target_indices`: int64 indices of the unmasked tokens; None if nothing is masked.
        """
        normed, _ = self.norm.fused(x, residual, None)
        assert isinstance(normed, torch.Tensor)
        return vocab_parallel_linear_cross_entropy(
            self._scaled(normed),
            self.weight,
            labels,
            loss_mask,
            self.vocab_size,
            self.tp,
            z_loss,
            target_indices,
            scale,
            self.sink,
            self.onednn,
            self.softcap,
        )


def _discarded(
    activation: Activation, compute: Callable[[], torch.Tensor], recompute: bool
) -> AbstractContextManager[None]:
    """If `recompute`, operations in this context save `compute` for their backward instead of `activation`."""
    if not recompute:
        return nullcontext()
    assert isinstance(activation, torch.Tensor)
    return discard_and_recompute(activation, compute)

"""Modules that hold parameters: linear layers, norm, embedding and head.

A module takes its tensors out of a mapping from path to parameter, so that shapes are stated once (in the parameter
table) and the same modules run on views of training buffers and on tensors read from a file. `tp` says with whom the
layer is shared; alone, all of them are plain.

Legend: t tokens, h hidden size, v vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import nn

from engine.config.schema import ModelConfig, OpsConfig
from engine.ops.norm import add_norm, layer_norm, norm_to_fp8, rms_norm
from engine.ops.quantize import Fp8Activation, Fp8Output
from engine.parallel.fp8 import fused_output
from engine.parallel.layout import TensorParallel
from engine.parallel.tensor import column_linear, row_linear, vocabulary_cross_entropy, vocabulary_embedding

Parameters = Mapping[str, nn.Parameter]


class ColumnLinear(nn.Module):
    """`x @ weight.T + bias`, cut by output features: [t/tp, in] -> [t, out/tp]. A bias is there if the table has it."""

    def __init__(self, parameters: Parameters, path: str, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameters[f"{path}.weight"]
        self.bias = parameters.get(f"{path}.bias")
        self.tp = tp

    def forward(self, x: torch.Tensor | Fp8Activation) -> torch.Tensor:
        return column_linear(x, self.weight, self.bias, self.tp)


class RowLinear(ColumnLinear):
    """`x @ weight.T + bias`, cut by input features: [t, in/tp] -> [t/tp, out]."""

    def forward(self, x: torch.Tensor | Fp8Activation) -> torch.Tensor:
        return row_linear(x, self.weight, self.bias, self.tp)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the table has a bias for it."""

    def __init__(
        self,
        parameters: Parameters,
        path: str,
        eps: float,
        ops: OpsConfig = OpsConfig(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        self.weight = parameters[f"{path}.weight"]
        self.bias = parameters.get(f"{path}.bias")
        self.eps, self.impl = eps, ops.norm

    def forward(self, x: torch.Tensor, feeds: ColumnLinear | None = None) -> torch.Tensor | Fp8Activation:
        """The norm of x [t, h]; in FP8 alone where it `feeds` a layer that multiplies so."""
        if output := self._fp8_output(x, feeds):
            return norm_to_fp8(x, None, self.weight, self.bias, self.eps, output)[0]
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps, impl=self.impl)
        return layer_norm(x, self.weight, self.bias, self.eps, impl=self.impl)

    def of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, feeds: ColumnLinear | None = None
    ) -> tuple[torch.Tensor | Fp8Activation, torch.Tensor]:
        """The norm of x + residual, as above, and that sum."""
        if output := self._fp8_output(x, feeds):
            return norm_to_fp8(x, residual, self.weight, self.bias, self.eps, output)
        return add_norm(x, residual, self.weight, self.bias, self.eps, impl=self.impl)

    def _fp8_output(self, x: torch.Tensor, feeds: ColumnLinear | None) -> Fp8Output | None:
        if feeds is None or self.impl not in ("auto", "triaxis"):
            return None
        return fused_output(feeds.weight, x, x.shape[-1])


class Embedding(nn.Module):
    """Tokens [t] -> hidden states [t/tp, h]."""

    def __init__(self, model: ModelConfig, parameters: Parameters, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameters["embedding.weight"]
        self.vocab_size, self.tp = model.vocab_size, tp

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return vocabulary_embedding(tokens, self.weight, self.vocab_size, self.tp)


class Head(nn.Module):
    """Final norm, projection to the vocabulary and loss."""

    def __init__(self, model: ModelConfig, parameters: Parameters, tp: TensorParallel, ops: OpsConfig) -> None:
        super().__init__()
        self.norm = Norm(parameters, "norm", model.norm_eps, ops)
        self.weight = parameters["embedding.weight" if model.tie_embeddings else "head.weight"]
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

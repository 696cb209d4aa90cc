"""Self-attention of the decoder: projections, rotary positions, and a pluggable way to attend.

`Attend` is given from outside: training attends within the documents of a batch, generation attends to a key/value
cache. The block itself is the same code for both.
"""

from collections.abc import Callable

import torch
from torch import nn

from engine.config.schema import ModelConfig, OpsConfig
from engine.model.layers import Norm, NormLinear, Output, Parameters, RowLinear
from engine.model.parameters import kv_replicas, kv_share
from engine.ops.attention import attention
from engine.ops.attention_choice import AttentionImpls
from engine.ops.norm import sharded_rms_norm
from engine.ops.quantize import GradHandover
from engine.ops.rope import apply_rope, apply_rope_qkv, rope_hands_over
from engine.ops.varlen import Scores
from engine.parallel.collectives import gathered
from engine.parallel.layout import TensorParallel
from engine.parallel.recompute import checkpoint

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [t, n, d], k [t, n_kv, d], v [t, n_kv, d]) -> [t, n, d]"""


Stream = tuple[torch.Tensor, torch.Tensor | None]
"""(x, residual), both [t/tp, h]: the output of a layer and the residual stream before it, or None for zeros. Their sum
is the stream after the layer; the next norm computes it in its pass over memory."""


class Attention(nn.Module):
    """Norm and grouped-query attention with fused q, k and v, over this rank's heads: [t/tp, h] -> [t/tp, h].

    With `selective_recompute` neither the output of the norm nor anything between the projections is kept for the
    backward pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        layer: int,
        tp: TensorParallel,
        ops: OpsConfig,
        *,
        selective_recompute: bool,
    ) -> None:
        super().__init__()
        block, path = f"layers.{layer}", f"layers.{layer}.attention"
        self.layer = layer
        kv_heads = kv_share(model, tp)[1]
        self.heads = (model.num_heads // tp.size, kv_heads, kv_heads)
        self.head_dim, self.is_partial = model.head_dim, model.rotary_dim < model.head_dim
        self.selective_recompute = selective_recompute
        self.qkv = NormLinear(
            parameters,
            f"{block}.attention_norm",
            f"{path}.qkv",
            model,
            tp,
            ops,
            selective_recompute=selective_recompute,
        )
        self.output = RowLinear(parameters, f"{path}.output", tp)
        self.finish = Output(parameters, f"{block}.attention_post_norm", model, ops)
        self.q_norm = Norm(parameters, f"{path}.q_norm", model, ops) if model.qk_norm else None
        self.k_norm = Norm(parameters, f"{path}.k_norm", model, ops) if model.qk_norm else None
        self.norm_per_head, self.tp = model.qk_norm_span == "head", tp
        kv_width = model.num_kv_heads * model.head_dim * kv_replicas(model, tp.size)
        self.widths = (model.num_heads * model.head_dim, kv_width)  # of all ranks' q and k, replicas included

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> Stream:
        """Return (attention(s), s) for s = x + residual; see `Stream`."""
        handover = self._grad_handover(x)
        qkv, total = self.qkv(x, residual, handover)  # [t, (n + 2 n_kv) d], n and n_kv of this rank
        if self.selective_recompute and torch.is_grad_enabled():
            attended = checkpoint(self._attend, qkv, cos, sin, attend, handover)
        else:
            attended = self._attend(qkv, cos, sin, attend, handover)
        return self.finish(self.output(attended)), total

    def _attend(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, handover: GradHandover | None
    ) -> torch.Tensor:
        qkv = qkv.unflatten(-1, (sum(self.heads), self.head_dim))
        if self.q_norm is not None:
            q, k, v = qkv.split(self.heads, dim=1)
            q, k = self.normalize(q, k)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        else:
            q, k, v = apply_rope_qkv(qkv, cos, sin, self.heads[1], handover)
        return self.attend(attend, q, k, v).flatten(1)  # [t, n d]

    def normalize(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm of `q` [t, n, d] and `k` [t, n_kv, d]: of each head, or of all heads, those of other ranks too."""
        assert self.q_norm is not None and self.k_norm is not None
        if self.norm_per_head:
            return self.q_norm(q), self.k_norm(k)
        q_width, k_width = self.widths
        return self._normalize_all(self.q_norm, q, q_width), self._normalize_all(self.k_norm, k, k_width)

    def _normalize_all(self, norm: Norm, x: torch.Tensor, width: int) -> torch.Tensor:
        """RMSNorm of all heads together, of which `x` [t, n, d] are this rank's; `width`: of those of all ranks."""
        flat, group = x.flatten(1), self.tp.group
        if group is None:
            return norm(flat).view_as(x)

        def mean(sums: torch.Tensor) -> torch.Tensor:
            return gathered(sums, group).unflatten(0, (group.size(), -1)).sum(0).div_(width)

        return sharded_rms_norm(flat, norm.factor, norm.eps, mean).view_as(x)

    def _grad_handover(self, x: torch.Tensor) -> GradHandover | None:
        """Of the gradient of q, k and v, from rotary positions to the projection; None if norms lie between them or a
        part of each head is not rotated.
        """
        if self.q_norm is not None or self.is_partial:
            return None
        return self.qkv.linear.grad_handover(x, lambda output: rope_hands_over(output, self.head_dim))

    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention proper, which depends on the documents of the batch; not compiled."""
        return attend(self.layer, q, k, v)


def scores_of(model: ModelConfig) -> Scores:
    """How a model computes attention scores."""
    return Scores(model.attention_scale, model.attention_softcap)


def attend_within(
    cu_seqlens: tuple[int, ...],
    model: ModelConfig,
    impls: AttentionImpls = AttentionImpls(),  # noqa: B008 (immutable)
) -> Attend:
    """Return causal attention within each segment of the flattened tokens, with the sliding window of each layer."""
    scores = scores_of(model)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        window = model.window(layer)
        return attention(q, k, v, cu_seqlens, window, impls.of(cu_seqlens, window), scores)

    return attend

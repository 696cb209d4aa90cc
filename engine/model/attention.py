"""Self-attention of the decoder: projections, rotary positions, and a pluggable way to attend.

`Attend` is given from outside: training attends within the documents of a batch, generation attends to a key/value
cache. The block itself is the same code for both.
"""

from collections.abc import Callable

import torch
from torch import nn

from engine.config.schema import AttentionImpl, ModelConfig, OpsConfig
from engine.model.layers import Norm, NormLinear, Output, Parameters, RowLinear
from engine.model.parameters import kv_replicas, kv_share
from engine.ops.attention import attention
from engine.ops.norm import sharded_rms_norm, sum_of_squares
from engine.ops.quantize import GradHandover
from engine.ops.rope import apply_rope, apply_rope_qkv, rope_hands_over
from engine.ops.varlen import STANDARD_SCORES, Scores
from engine.parallel.collectives import gather_sequence
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
        self.head_dim = model.head_dim
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
        # of all heads, and how often the ranks' heads together have each
        self.widths = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim)
        self.replicas = (1, kv_replicas(model, tp.size))

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
        """RMSNorm of `q` [t, n, d] and `k` [t, n_kv, d]: of each head, or of all heads, those of other ranks included."""
        assert self.q_norm is not None and self.k_norm is not None
        if self.norm_per_head:
            return self.q_norm(q), self.k_norm(k)
        flat, norms = (q.flatten(1), k.flatten(1)), (self.q_norm, self.k_norm)
        if self.tp.size == 1:
            normed = [norm(x) for norm, x in zip(norms, flat, strict=True)]
        else:
            own = [sum_of_squares(x) / count for x, count in zip(flat, self.replicas, strict=True)]
            # [t, 2]; as a gather of the ranks' sums, whose backward sums their gradients
            sums = gather_sequence(torch.cat(own, 1), self.tp.group).unflatten(0, (self.tp.size, -1)).sum(0)
            normed = [
                sharded_rms_norm(x, norm.factor, total / width, norm.eps)
                for x, norm, total, width in zip(flat, norms, sums.split(1, 1), self.widths, strict=True)
            ]
        return normed[0].view_as(q), normed[1].view_as(k)

    def _grad_handover(self, x: torch.Tensor) -> GradHandover | None:
        """Of the gradient of q, k and v, from rotary positions to the projection; None if norms lie between them."""
        if self.q_norm is not None:
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
    sliding_window: int | None,
    impl: AttentionImpl = "auto",
    scores: Scores = STANDARD_SCORES,
) -> Attend:
    """Return causal attention within each segment of the flattened tokens; `impl`: see `ops/attention.py`."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, cu_seqlens, sliding_window, impl, scores)

    return attend

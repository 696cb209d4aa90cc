"""Self-attention of the decoder: projections, rotary positions, and a pluggable way to attend.

`Attend` is given from outside: training attends within the documents of a batch, generation attends to a key/value
cache. The block itself is the same code for both.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from engine.config import ModelConfig, OpsConfig
from engine.model.layers import ColumnLinear, Norm, Parameters, RowLinear
from engine.model.parameters import kv_share
from engine.ops.attention import AttentionImpl, attention, attention_with_cache
from engine.ops.rope import apply_rope, apply_rope_qkv
from engine.parallel.layout import ALONE, TensorParallel
from engine.parallel.recompute import again

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [t, n, d], k [t, n_kv, d], v [t, n_kv, d]) -> [t, n, d]"""


class Attention(nn.Module):
    """Grouped-query attention with fused q, k and v, over this rank's heads. `recompute` forgets all between the
    projections."""

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        path: str,
        layer: int,
        tp: TensorParallel,
        *,
        recompute: bool,
        ops: OpsConfig = OpsConfig(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        self.layer = layer
        kv_heads = kv_share(model, tp)[1]
        self.heads = (model.num_heads // tp.size, kv_heads, kv_heads)
        self.head_dim = model.head_dim
        self.recompute = recompute
        self.qkv = ColumnLinear(parameters, f"{path}.qkv", tp)
        self.output = RowLinear(parameters, f"{path}.output", tp)
        self.q_norm = Norm(parameters, f"{path}.q_norm", model.norm_eps, ops) if model.qk_norm else None
        self.k_norm = Norm(parameters, f"{path}.k_norm", model.norm_eps, ops) if model.qk_norm else None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        qkv = self.qkv(x)  # [t, (n + 2 n_kv) d], n and n_kv of this rank
        if self.recompute and torch.is_grad_enabled():
            return self.output(again(self._attend, qkv, cos, sin, attend))
        return self.output(self._attend(qkv, cos, sin, attend))

    def _attend(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        qkv = qkv.unflatten(-1, (sum(self.heads), self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.heads, dim=1)
            q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        else:
            q, k, v = apply_rope_qkv(qkv, cos, sin, self.heads[1])
        return self.attend(attend, q, k, v).flatten(1)  # [t, n d]

    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The part that depends on the documents of the batch."""
        return attend(self.layer, q, k, v)


def attend_within(cu_seqlens: tuple[int, ...], sliding_window: int | None, impl: AttentionImpl = "auto") -> Attend:
    """Causal attention closed within each segment of the flattened tokens; `by`: see `ops.attention`."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, cu_seqlens, sliding_window, impl)

    return attend


class KeyValueCache:
    """Keys and values of growing sequences, one slab for all layers, allocated once: this rank's heads alone.

    Rejected: pages of keys and values that sequences share (vLLM), which pay when thousands of requests come and go.
    """

    def __init__(
        self,
        model: ModelConfig,
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        tp: TensorParallel = ALONE,
    ) -> None:
        shape = (2, model.num_layers, sequences, capacity, kv_share(model, tp)[1], model.head_dim)
        self.slab = torch.zeros(shape, dtype=dtype, device=device)  # a masked place must be finite: 0 · NaN is NaN
        self.sliding_window = model.sliding_window
        self.lengths = [0] * sequences

    def extend(self, rows: range, count: int) -> tuple[torch.Tensor, Attend]:
        """Make place for `count` new tokens of each of the sequences `rows`, one sequence after another.

        Returns:
            their positions, [rows · count], and how they attend. Tokens behind them are padding: they attend to
            nothing and give 0.
        """
        device, some = self.slab.device, slice(rows.start, rows.stop)
        self.lengths[some] = ends = [length + count for length in self.lengths[some]]
        places = torch.tensor(ends, device=device)[:, None] + torch.arange(-count, 0, device=device)
        row = torch.arange(len(rows), device=device)[:, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.slab[:, layer, some]  # [b, capacity, n_kv, d]
            padding = len(q) - places.numel()
            q, k, v = (x[: places.numel()].unflatten(0, places.shape) for x in (q, k, v))
            keys[row, places], values[row, places] = k, v
            out = attention_with_cache(q, keys, values, tuple(ends), self.sliding_window)
            return functional.pad(out.flatten(0, 1), (0, 0, 0, 0, 0, padding))

        return places.flatten(), attend

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences but `rows`, which move together to the front."""
        self.slab = self.slab[:, :, rows]
        self.lengths = [self.lengths[row] for row in rows]

"""The key/value cache of generation.

Legend: b sequences, t tokens, n heads, n_kv key and value heads, d head size.
"""

import torch
from torch.nn import functional

from engine.config.schema import ModelConfig
from engine.model.attention import Attend, scores_of
from engine.model.parameters import kv_share
from engine.ops.attention import attention_with_cache
from engine.parallel.layout import NO_TP, TensorParallel


class KeyValueCache:
    """Keys and values of the tokens of several sequences, for the heads of this rank.

    One tensor for all layers, allocated once. Alternative considered: shared pages (vLLM), which pay off with thousands
    of concurrent requests.

    Args:
        sequences: number of sequences; one row each.
        capacity: maximum number of tokens of a sequence.
        tp: this rank's place in the tensor-parallel group.

    Attributes:
        slab: [2, layers, sequences, capacity, kv_heads/tp, head_dim]; keys, then values.
        lengths: number of cached tokens of each sequence.
    """

    def __init__(
        self,
        model: ModelConfig,
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        tp: TensorParallel = NO_TP,
    ) -> None:
        shape = (2, model.num_layers, sequences, capacity, kv_share(model, tp)[1], model.head_dim)
        self.slab = torch.zeros(shape, dtype=dtype, device=device)  # masked entries must be finite: 0 · NaN is NaN
        self.windows = [model.window(layer) for layer in range(model.num_layers)]
        self.scores = scores_of(model)
        self.lengths = [0] * sequences

    def extend(self, rows: range, count: int) -> tuple[torch.Tensor, Attend]:
        """Extend each of the sequences `rows` by `count` new tokens.

        Returns:
            positions: positions of the new tokens, sequence by sequence, [rows · count], int64.
            attend: function that takes q [t, n, d], k and v [t, n_kv, d] of the new tokens, stores k and v in the
                cache, and returns the attention output [t, n, d]. Tokens after the first rows · count are padding with
                output 0.
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
            out = attention_with_cache(q, keys, values, tuple(ends), self.windows[layer], self.scores)
            return functional.pad(out.flatten(0, 1), (0, 0, 0, 0, 0, padding))

        return places.flatten(), attend

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences except `rows`, which become rows 0, 1, ..."""
        self.slab = self.slab[:, :, rows]
        self.lengths = [self.lengths[row] for row in rows]

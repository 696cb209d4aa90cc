"""Causal attention over segments of a flat token dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], sliding_window: int | None = None
) -> Tensor:
    """Softmax attention of `q` [t, n, d] over `k`, `v` [t, n_kv, d], causal within each segment: [t, n, d].

    Segment i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. With `sliding_window` a token sees itself and the
    window − 1 tokens before it.
    """
    lengths = [stop - start for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    outs = [
        attention_with_cache(*parts, sliding_window)
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(outs)


def attention_with_cache(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None = None) -> Tensor:
    """Attention of the newest tokens of one sequence, `q` [t_new, n, d], over all of it, `k`, `v` [t_total, n_kv, d]."""
    queries, keys = q.shape[0], k.shape[0]
    at = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    mask = at >= 0
    if sliding_window is not None:
        mask &= at < sliding_window
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)

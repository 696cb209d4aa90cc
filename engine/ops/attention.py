"""Causal attention over segments of a flat token dimension.

Segment boundaries are integers on the host, so that selecting a path does not synchronize with the device. Consecutive
segments of the same length share a call of `F.scaled_dot_product_attention`, which has a fast kernel for each device;
the other implementations take all segments in one call (varlen.py). Scores with a softcap, which it does not have, are
plain PyTorch in its place, computed again in the backward pass. Alternative considered: one call with a block-diagonal
mask (quadratic in the microbatch, and masked flash kernels are slower).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import groupby, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from engine.config.schema import AttentionImpl
from engine.ops.varlen import STANDARD_SCORES, Scores, device_ints, varlen_attention, why_not

AttentionKind = Literal["plain", "documents", "windows"]
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[int, ...],
    sliding_window: int | None = None,
    impl: AttentionImpl = "auto",
    scores: Scores = STANDARD_SCORES,
) -> Tensor:
    """Softmax attention of `q` [t, n, d] over `k`, `v` [t, n_kv, d], causal within each segment: [t, n, d].

    Segment i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. With `sliding_window`, a token attends to itself and the
    window − 1 tokens before it. `auto` is PyTorch's implementation; a model measures others (attention_choice.py).
    """
    if impl == "auto":
        plain = not q.is_cuda or attention_kind(cu_seqlens, sliding_window) == "plain"
        impl = "sdpa" if plain else torch_impl(q.dtype, q.shape[2], torch.cuda.get_device_capability(q.device), scores)
    if impl != "sdpa" and len(q):
        return varlen_attention(impl, q, k, v, cu_seqlens, sliding_window, scores)
    lengths = [b - a for a, b in pairwise(cu_seqlens)]
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    if len(runs) == 1:
        return _equal_segments(q, k, v, runs[0][0], sliding_window, scores)
    sizes = [length * count for length, count in runs]
    parts = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_equal_segments(q, k, v, length, sliding_window, scores) for (length, _), q, k, v in parts])


def attention_kind(cu_seqlens: tuple[int, ...], sliding_window: int | None) -> AttentionKind:
    """Return "windows" if the window shortens a segment, else "plain" if all have one length, else "documents"."""
    lengths = {end - start for start, end in pairwise(cu_seqlens)}
    if sliding_window is not None and sliding_window < max(lengths):
        return "windows"
    return "plain" if len(lengths) == 1 else "documents"


def torch_impl(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], scores: Scores = STANDARD_SCORES
) -> AttentionImpl:
    """Return PyTorch's implementation for documents and windows on a GPU: its variable-length kernel, if it can."""
    return "sdpa" if why_not("varlen", dtype, head_dim, capability, deterministic=False, scores=scores) else "varlen"


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[int, ...],
    sliding_window: int | None = None,
    scores: Scores = STANDARD_SCORES,
) -> Tensor:
    """Reference: one masked softmax over all pairs of tokens."""
    segment = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
    segment[list(cu_seqlens[1:-1])] = 1
    segment = segment.cumsum(0)
    seen = _seen(q.shape[0], k.shape[0], sliding_window, q.device) & (segment[:, None] == segment)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    products = torch.einsum("qnd,knd->nqk", q, k) * (scores.scale or q.shape[-1] ** -0.5)
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    return torch.einsum("nqk,knd->qnd", products.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    sliding_window: int | None = None,
    scores: Scores = STANDARD_SCORES,
) -> Tensor:
    """Attention of the newest tokens of b sequences, `q` [b, t_new, n, d], over the KV cache: [b, t_new, n, d].

    Sequence i uses the first lengths[i] entries of `k` and `v` [b, capacity, n_kv, d]; the others must be finite.
    """
    new = q.shape[1]
    first = 0 if sliding_window is None else max(0, min(lengths) - new + 1 - sliding_window)
    k, v = k[:, first : max(lengths)], v[:, first : max(lengths)]
    sees_all = new == 1 and min(lengths) == max(lengths)
    ends = tuple(length - first for length in lengths)
    mask = None if sees_all else _seen_of_each(new, ends, sliding_window, q.device)
    return _sdpa(q, k, v, mask, scores) if scores.softcap is None else _softcapped(q, k, v, lambda: mask, scores)


def _equal_segments(q: Tensor, k: Tensor, v: Tensor, length: int, sliding_window: int | None, scores: Scores) -> Tensor:
    if length == 0:
        return q.clone()
    q4, k4, v4 = (x.unflatten(0, (-1, length)) for x in (q, k, v))  # [b, s, n, d]
    seen = partial(_seen, length, length, sliding_window, q.device)
    if scores.softcap is not None:
        arguments = (q4, k4, v4, seen, scores)
        out: Tensor = checkpoint(_softcapped, *arguments, use_reentrant=False, preserve_rng_state=False)
    elif sliding_window is None or sliding_window >= length:
        out = _sdpa(q4, k4, v4, None, scores, is_causal=True)
    else:
        out = _sdpa(q4, k4, v4, seen(), scores)
    return out.flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, *, is_causal: bool = False) -> Tensor:
    """SDPA for tensors [b, s, n, d], transposed to [b, n, s, d] as it expects."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scores.scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, seen: Callable[[], Tensor | None], scores: Scores) -> Tensor:
    """`_sdpa` with limited scores, in fp32 or wider, in plain PyTorch. `seen`: makes the mask."""
    assert scores.softcap is not None
    groups, scale = q.shape[2] // k.shape[2], scores.scale or q.shape[-1] ** -0.5
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    products = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32))  # [b, n, s, s']
    limited = (products * (scale / scores.softcap)).tanh() * scores.softcap
    if (mask := seen()) is not None:
        limited = limited.masked_fill(~mask, -torch.inf)
    return (limited.softmax(-1).to(q.dtype) @ v).transpose(1, 2)


def _seen(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Mask [queries, keys]: True where a query attends to a key; the last query is at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if sliding_window is None else seen & (distance < sliding_window)


@lru_cache(maxsize=8)  # shared by all layers of a step
def _seen_of_each(new: int, ends: tuple[int, ...], sliding_window: int | None, device: torch.device) -> Tensor:
    """Mask [b, 1, new, longest]: True where a query attends to a key. Sequence i ends at key ends[i] - 1."""
    queries = device_ints(ends, device)[:, None] + torch.arange(-new, 0, device=device)  # [b, new]
    distance = queries[..., None] - torch.arange(max(ends), device=device)
    seen = distance >= 0
    return (seen if sliding_window is None else seen & (distance < sliding_window))[:, None]

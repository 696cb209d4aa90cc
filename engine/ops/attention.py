"""Causal attention over segments of a flat token dimension.

Segment boundaries are integers on the host, so that selecting a path does not synchronize with the device. Consecutive
segments of the same length share a call of `F.scaled_dot_product_attention`, which has a fast kernel for each device.
Alternative considered: one call with a block-diagonal mask (quadratic in the microbatch, and masked flash kernels are
slower).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib import import_module
from inspect import signature
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config.schema import AttentionImpl

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
) -> Tensor:
    """Softmax attention of `q` [t, n, d] over `k`, `v` [t, n_kv, d], causal within each segment: [t, n, d].

    Segment i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. With `sliding_window`, a token attends to itself and the
    window − 1 tokens before it.
    """
    if (impl := choose_impl(impl, q, cu_seqlens, sliding_window)) != "sdpa":
        return _all_segments(impl, q, k, v, cu_seqlens, sliding_window)
    lengths = [b - a for a, b in pairwise(cu_seqlens)]
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    if len(runs) == 1:
        return _equal_segments(q, k, v, runs[0][0], sliding_window)
    sizes = [length * count for length, count in runs]
    parts = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_equal_segments(q, k, v, length, sliding_window) for (length, _), q, k, v in parts])


def choose_impl(
    impl: AttentionImpl, q: Tensor, cu_seqlens: tuple[int, ...], sliding_window: int | None
) -> AttentionImpl:
    """Resolve `auto`. On a GPU, sequences of equal length without a window use SDPA, whose cuDNN kernel is the fastest;
    others use variable-length kernels, which take all documents in one call but only half precision.
    """
    if impl != "auto":
        return impl
    lengths = {b - a for a, b in pairwise(cu_seqlens)}
    plain = len(lengths) == 1 and (sliding_window is None or sliding_window >= max(lengths))
    if not q.is_cuda or plain or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256:
        return "sdpa"
    return "varlen" if _flash_attn(torch.cuda.get_device_capability(q.device)[0]) is None else "flash_attn"


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], sliding_window: int | None = None
) -> Tensor:
    """Reference: one masked softmax over all pairs of tokens."""
    segment = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
    segment[list(cu_seqlens[1:-1])] = 1
    segment = segment.cumsum(0)
    seen = _seen(q.shape[0], k.shape[0], sliding_window, q.device) & (segment[:, None] == segment)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qnd,knd->nqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attention_with_cache(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], sliding_window: int | None = None
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
    return _sdpa(q, k, v, mask)


def _equal_segments(q: Tensor, k: Tensor, v: Tensor, length: int, sliding_window: int | None) -> Tensor:
    if length == 0:
        return q.clone()
    q4, k4, v4 = (x.unflatten(0, (-1, length)) for x in (q, k, v))  # [b, s, n, d]
    if sliding_window is None or sliding_window >= length:
        return _sdpa(q4, k4, v4, None, is_causal=True).flatten(0, 1)
    return _sdpa(q4, k4, v4, _seen(length, length, sliding_window, q.device)).flatten(0, 1)


def _all_segments(
    impl: AttentionImpl, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], sliding_window: int | None
) -> Tensor:
    """Variable-length flash attention: one call for documents of any length."""
    offsets, longest = _offsets(cu_seqlens, q.device), max(b - a for a, b in pairwise(cu_seqlens))
    reach = None if sliding_window is None else sliding_window - 1  # tokens before the query
    if impl == "varlen":
        function, known = _varlen()
        if "enable_gqa" not in known:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        options: dict[str, Any] = {"window_size": (-1 if reach is None else reach, 0)}
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        return function(q, k, v, offsets, offsets, longest, longest, **options)
    if impl == "te":
        attend = _te_attention(q.shape[1], k.shape[1], q.shape[2])
        window = None if reach is None else (reach, 0)
        given = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, "max_seqlen_q": longest, "max_seqlen_kv": longest}
        return attend(q, k, v, **given, window_size=window).view_as(q)
    options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
    options |= {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if reach is not None:
        options["window_size"] = (reach, 0)
    flash_attn = _flash_attn(torch.cuda.get_device_capability(q.device)[0])
    if flash_attn is None:
        raise ValueError("ops.attention = flash_attn: no installed version of flash-attn runs on this GPU; use varlen")
    out = flash_attn(q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out


@cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    """PyTorch's varlen_attn and its argument names: in torch 2.11 it does not support grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(signature(varlen_attn).parameters)


@cache
def _flash_attn(capability: int) -> Callable[..., Any] | None:
    """The newest installed version of flash-attn: 4, 3 (both for Hopper and later) or 2; None if there is none.

    All have the same argument names and infer grouped heads from the shapes.
    """
    modules = ["flash_attn.cute", "flash_attn_interface"] if capability >= 9 else []
    for name in [*modules, "flash_attn"]:
        try:
            function: Callable[..., Any] = import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        return function
    return None


@cache
def _te_attention(heads: int, kv_heads: int, head_dim: int) -> Callable[..., Tensor]:
    """Transformer Engine's attention, which chooses between cuDNN and flash-attn."""
    import transformer_engine.pytorch as te

    attend: Callable[..., Tensor] = te.DotProductAttention(
        heads, head_dim, num_gqa_groups=kv_heads, qkv_format="thd", attn_mask_type="padding_causal"
    )
    return attend


@lru_cache(maxsize=8)  # shared by all layers of a microbatch
def _offsets(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    host = torch.tensor(cu_seqlens, dtype=torch.int32, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """SDPA for tensors [b, s, n, d], transposed to [b, n, s, d] as it expects."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _seen(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Mask [queries, keys]: True where a query attends to a key; the last query is at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if sliding_window is None else seen & (distance < sliding_window)


@lru_cache(maxsize=8)  # shared by all layers of a step
def _seen_of_each(new: int, ends: tuple[int, ...], sliding_window: int | None, device: torch.device) -> Tensor:
    """Mask [b, 1, new, longest]: True where a query attends to a key. Sequence i ends at key ends[i] - 1."""
    queries = _offsets(ends, device)[:, None] + torch.arange(-new, 0, device=device)  # [b, new]
    distance = queries[..., None] - torch.arange(max(ends), device=device)
    seen = distance >= 0
    return (seen if sliding_window is None else seen & (distance < sliding_window))[:, None]

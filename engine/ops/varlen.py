"""Attention over documents of any length in one call: PyTorch's variable-length kernel and those of other packages.

Each implementation has a row in `_LIMITS`, which says where it runs, and a call with the same arguments. Documents of
one length are given to flash-attn as a batch. docs/attention.md has the versions that each call was tried with.
Alternative considered: PyTorch's registry of flash-attention implementations (`torch.nn.attention`), which replaces its
kernels for the whole process and cannot be compared with them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.config.schema import AttentionImpl


@dataclass(frozen=True)
class Scores:
    """How a model computes its attention scores from the products of queries and keys.

    Attributes:
        scale: factor of the products; None: 1 / √head size.
        softcap: limits a score to softcap · tanh(score / softcap).
    """

    scale: float | None = None
    softcap: float | None = None


STANDARD_SCORES = Scores()
_SOFTCAP: tuple[AttentionImpl, ...] = ("auto", "sdpa", "flash_attn", "flash_attn_3", "flash_attn_4")


@dataclass(frozen=True)
class _Limits:
    """GPUs and sizes that an implementation supports, forward and backward. All need bf16 or fp16.

    Attributes:
        majors: compute capabilities, without the minor number.
        head_dim: largest; multiples of 8.
    """

    majors: range
    head_dim: int


_AMPERE_AND_LATER = range(8, 100)
_LIMITS: dict[AttentionImpl, _Limits] = {
    "varlen": _Limits(_AMPERE_AND_LATER, 256),
    "flash_attn": _Limits(_AMPERE_AND_LATER, 256),
    "flash_attn_3": _Limits(range(9, 10), 256),
    "flash_attn_4": _Limits(range(9, 12), 256),  # 12.x: no deterministic backward pass
    "cudnn": _Limits(_AMPERE_AND_LATER, 128),  # 256 on Hopper only
    "te": _Limits(_AMPERE_AND_LATER, 256),
}
_CUDNN_WITH_EMPTY_DOCUMENTS = 92500  # NaN before: NVIDIA/cudnn-frontend#943


def why_not(
    impl: AttentionImpl,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    *,
    deterministic: bool,
    scores: Scores = STANDARD_SCORES,
) -> str | None:
    """Return why `impl` cannot train with these sizes on this GPU, as the rest of a sentence about it, or None."""
    if scores.softcap is not None and impl not in _SOFTCAP:
        return f"does not support model.attention_softcap = {scores.softcap}, which sdpa and flash_attn do"
    limits = _LIMITS.get(impl)
    if limits is None:
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, and precision.mode computes in {str(dtype).removeprefix('torch.')}"
    major, minor = capability
    if major not in limits.majors:
        newest = "" if limits.majors == _AMPERE_AND_LATER else f" to {limits.majors[-1]}.x"
        return f"needs compute capability {limits.majors[0]}.0{newest}, and this GPU has {major}.{minor}"
    if head_dim % 8 or head_dim > limits.head_dim:
        return f"needs a head size of at most {limits.head_dim} and a multiple of 8, and model.head_dim = {head_dim}"
    if impl == "flash_attn_4" and major > 9 and 128 < head_dim < 256:
        return f"needs a head size of at most 128, or 256, on this GPU, and model.head_dim = {head_dim}"
    if impl == "flash_attn_3" and deterministic and head_dim > 192:
        return f"is not deterministic with heads larger than 192, and model.head_dim = {head_dim}"
    return None


def varlen_attention(
    impl: AttentionImpl,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[int, ...],
    sliding_window: int | None,
    scores: Scores = STANDARD_SCORES,
) -> Tensor:
    """`attention` (engine/ops/attention.py) by `impl`, one of `_LIMITS`; at least one token."""
    cu_seqlens = tuple(dict.fromkeys(cu_seqlens))  # without empty documents, on which some kernels fail
    longest = max(b - a for a, b in pairwise(cu_seqlens))
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    return _CALLS[impl](q, k, v, cu_seqlens, longest, window, scores)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], longest: int, window: int | None, scores: Scores
) -> Tensor:
    function, known = _varlen_attn()
    offsets = device_ints(cu_seqlens, q.device)
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scores.scale}
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return function(q, k, v, offsets, offsets, longest, longest, **options)


@cache
def _varlen_attn() -> tuple[Callable[..., Any], frozenset[str]]:
    """PyTorch's varlen_attn and its argument names: in torch 2.11 it does not support grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(signature(varlen_attn).parameters)


def _flash_attn(
    module: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[int, ...],
    longest: int,
    window: int | None,
    scores: Scores,
) -> Tensor:
    """flash-attn 2, 3 or 4, which have the same argument names and infer grouped heads from the shapes."""
    package = import_module(module)
    options: dict[str, Any] = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if scores.scale is not None:
        options["softmax_scale"] = scores.scale
    if scores.softcap is not None:
        options["softcap"] = scores.softcap
    if all(b - a == longest for a, b in pairwise(cu_seqlens)):
        out = package.flash_attn_func(*(x.unflatten(0, (-1, longest)) for x in (q, k, v)), **options)
    else:
        offsets = device_ints(cu_seqlens, q.device)
        lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = package.flash_attn_varlen_func(q, k, v, **lengths, **options)
    return (out[0] if isinstance(out, tuple) else out).view_as(q)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], longest: int, window: int | None, scores: Scores
) -> Tensor:
    """The ragged layout of cuDNN, by its Python frontend, which plans once for each number of documents and longest
    length. Both are rounded up to a power of two, so that plans are few; the number by empty documents behind the last.
    """
    from cudnn import sdpa_torch

    if (torch.backends.cudnn.version() or 0) >= _CUDNN_WITH_EMPTY_DOCUMENTS:
        cu_seqlens += cu_seqlens[-1:] * (power_of_two(len(cu_seqlens) - 1) - (len(cu_seqlens) - 1))
    offsets, longest = device_ints(cu_seqlens, q.device), power_of_two(longest)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    reach = -1 if window is None else window  # with the token itself
    options = {"is_causal": True, "window_left": reach, "scale": scores.scale}
    out, _ = sdpa_torch(q, k, v, return_lse=True, **options, **lengths)  # which gradients need
    return out


def power_of_two(count: int) -> int:
    """Round up to a power of two."""
    return 1 << (count - 1).bit_length()


def _te(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], longest: int, window: int | None, scores: Scores
) -> Tensor:
    offsets = device_ints(cu_seqlens, q.device)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    attend = _te_attention(q.shape[1], k.shape[1], q.shape[2], scores.scale)
    return attend(q, k, v, **lengths, window_size=None if window is None else (window - 1, 0)).view_as(q)


@cache
def _te_attention(heads: int, kv_heads: int, head_dim: int, scale: float | None) -> Callable[..., Tensor]:
    """Transformer Engine's attention, which chooses between cuDNN and flash-attn."""
    import transformer_engine.pytorch as te

    attend: Callable[..., Tensor] = te.DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=kv_heads,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )
    return attend


_CALLS: dict[AttentionImpl, Callable[..., Tensor]] = {
    "varlen": _torch,
    "flash_attn": partial(_flash_attn, "flash_attn"),
    "flash_attn_3": partial(_flash_attn, "flash_attn_interface"),
    "flash_attn_4": partial(_flash_attn, "flash_attn.cute"),
    "cudnn": _cudnn,
    "te": _te,
}


@lru_cache(maxsize=8)  # shared by all layers of a microbatch
def device_ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy `values` to the device as int32, without waiting for it."""
    host = torch.tensor(values, dtype=torch.int32, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)

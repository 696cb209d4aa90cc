"""`ops.attention: auto` on a GPU: the implementation that measures fastest, for sequences of one length and for others.

Every installed implementation that supports the sizes is timed, forward and backward. PyTorch's own comes first:
another must agree with it, and be faster by more than noise. Alternative considered: a fixed order from published
figures, which differ by GPU and version, and do not exist for documents (docs/attention.md).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from engine.config.schema import AttentionImpl
from engine.ops.attention import AttentionKind, attention, attention_kind, torch_impl
from engine.ops.choice import installed, package_versions
from engine.ops.measured import Key, fastest
from engine.ops.varlen import STANDARD_SCORES, Scores, why_not

IMPLS: tuple[AttentionImpl, ...] = get_args(AttentionImpl)
_ROUNDS = 7
_MARGIN = 0.05  # by which another implementation must be faster than PyTorch's
_TOLERANCE = 2e-2  # relative L2 distance of results that differ in the order of their sums, in bf16
_PACKAGES: tuple[AttentionImpl, ...] = ("flash_attn", "flash_attn_3", "flash_attn_4", "cudnn")


@dataclass(frozen=True)
class AttentionImpls:
    """Implementations of attention of a model: for sequences of one length, for documents, and for sliding windows."""

    plain: AttentionImpl = "auto"
    documents: AttentionImpl = "auto"
    windows: AttentionImpl = "auto"

    def of(self, cu_seqlens: tuple[int, ...], sliding_window: int | None) -> AttentionImpl:
        """Return the implementation for a batch and the window of a layer."""
        impl: AttentionImpl = getattr(self, attention_kind(cu_seqlens, sliding_window))
        return impl


@dataclass(frozen=True)
class AttentionProblem:
    """Attention of one layer to an example of a microbatch, on a GPU."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    cu_seqlens: tuple[int, ...]
    sliding_window: int | None
    scores: Scores = STANDARD_SCORES

    @property
    def kind(self) -> AttentionKind:
        """Sequences of one length, documents, or a sliding window."""
        return attention_kind(self.cu_seqlens, self.sliding_window)


def example_documents(tokens: int, document_tokens: float) -> tuple[int, ...]:
    """Return the boundaries of documents of about `document_tokens` on average, the longest of twice that."""
    count = max(2, round(tokens / document_tokens))
    return tuple(tokens * i**2 // count**2 for i in range(count + 1))


def possible_impls(problem: AttentionProblem, capability: tuple[int, int]) -> list[AttentionImpl]:
    """List what is installed and supports `problem` on a GPU of this compute capability; PyTorch's own first."""
    plain, scores = problem.kind == "plain", problem.scores
    first = "sdpa" if plain else torch_impl(problem.dtype, problem.head_dim, capability, scores)
    others = ("varlen", *_PACKAGES[:-1]) if plain else _PACKAGES  # cuDNN is in SDPA, too
    return [first] + [
        impl
        for impl in others
        if (impl == "varlen" or installed(impl))
        and why_not(impl, problem.dtype, problem.head_dim, capability, deterministic=False, scores=scores) is None
    ]


def attention_key(problem: AttentionProblem) -> Key:
    """Return what the result of `measure_attention` depends on."""
    return {
        "what": "attention",
        "gpu": torch.cuda.get_device_name(problem.device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() or 0,
        **{name: found or "" for name, found in package_versions().items()},
        "dtype": str(problem.dtype),
        "heads": f"{problem.heads}, {problem.kv_heads} of keys and values, of {problem.head_dim}",
        "cu_seqlens": str(problem.cu_seqlens),
        "sliding_window": problem.sliding_window or 0,
        **({} if problem.scores == STANDARD_SCORES else {"scores": str(problem.scores)}),
    }


def parse_attention(name: str) -> AttentionImpl:
    """Return the implementation of this name.

    Raises:
        ValueError: there is none.
    """
    for impl in IMPLS:
        if impl == name:
            return impl
    raise ValueError(f"{name} is not one of {', '.join(IMPLS)}")


def measure_attention(problem: AttentionProblem) -> AttentionImpl:
    """Return the fastest implementation for `problem`. Takes a tenth of a second, and half a minute if FlashAttention-4
    is installed, which compiles itself.
    """
    impls = possible_impls(problem, torch.cuda.get_device_capability(problem.device))
    return fastest_that_agrees(impls, problem, _seconds_on_gpu) if len(impls) > 1 else impls[0]


def fastest_that_agrees(
    impls: Sequence[AttentionImpl], problem: AttentionProblem, seconds: Callable[[Callable[[], object]], float]
) -> AttentionImpl:
    """Return the fastest of `impls` of those that agree with the first; warn about the others."""
    run = _runner(problem)
    expected = run(impls[0])
    able = [impls[0], *(impl for impl in impls[1:] if _agrees(impl, run, expected))]
    return fastest(able, lambda impl: seconds(lambda: run(impl)), rounds=_ROUNDS, margin=_MARGIN)


def _runner(problem: AttentionProblem) -> Callable[[AttentionImpl], tuple[Tensor, ...]]:
    """Return a function that attends, forward and backward, to random inputs: output and gradients of q, k and v."""
    generator, size = torch.Generator(problem.device).manual_seed(0), (problem.cu_seqlens[-1], problem.head_dim)
    q, k, v, grad = (
        torch.randn(size[0], n, size[1], device=problem.device, generator=generator).to(problem.dtype)
        for n in (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(impl: AttentionImpl) -> tuple[Tensor, ...]:
        out = attention(q, k, v, problem.cu_seqlens, problem.sliding_window, impl, problem.scores)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return run


def _agrees(
    impl: AttentionImpl, run: Callable[[AttentionImpl], tuple[Tensor, ...]], expected: tuple[Tensor, ...]
) -> bool:
    try:
        distances = [
            ((a - b).float().norm() / b.float().norm()).item() for a, b in zip(run(impl), expected, strict=True)
        ]
    except Exception as error:  # of a package that is broken, or does not fit the others
        warnings.warn(f"ops.attention = auto leaves out {impl}: {type(error).__name__}: {error}", stacklevel=2)
        return False
    if all(distance <= _TOLERANCE for distance in distances):  # not if one is NaN
        return True
    off = ", ".join(f"{distance:.1e}" for distance in distances)
    warnings.warn(f"ops.attention = auto leaves out {impl}: output and gradients are off by {off}", stacklevel=2)
    return False


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000

"""Linear layers, y = x·Wᵀ + b, and the matmuls of their gradients.

On a CPU, PyTorch's fp32 matmuls use MKL, which uses only half of the vector width on some processors of other vendors
than Intel. oneDNN, which PyTorch also includes, uses all of it (twice as fast on an AMD EPYC with AVX-512) and needs no
copy of transposed operands; the smallest matmuls use MKL, which has less overhead per call. Which library is faster for
the others depends on the processor and on the kind of matmul: training measures it (`measure_onednn`), other programs
take oneDNN. Alternatives considered: 1×1 convolutions, the public API of oneDNN (their gradients are slower than
MKL's), and the settings of `torch.backends.mkldnn` (global, and they lower the precision if the processor supports it).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops.measured import Key, fastest, processor_name

_MIN_ROWS = 16  # below, oneDNN's reordering of the weight takes longer than it saves
_MIN_MULTIPLICATIONS = 2**21  # below, its overhead per call of about 15 µs dominates
_LARGE = 2**27  # multiplications of a large matmul, about a millisecond of one core
_SIZES = {"small": (256, 256, 256), "large": (512, 512, 512)}  # tokens, outputs and inputs that are measured
_PASSES = ("forward", "input gradient", "weight gradient")
_ROUNDS, _MARGIN = 9, 0.05

MATMUL_KINDS = frozenset(f"{size} {of_pass}" for size in _SIZES for of_pass in _PASSES)
"""The kinds of fp32 matmuls on a CPU for which the library is chosen."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times `weight` [out, in] transposed, plus `bias` [out]: [..., out]."""
    if uses_onednn(x, weight):
        return _OneDnnLinear.apply(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Reference of `linear`: PyTorch's `F.linear`."""
    return F.linear(x, weight, bias)


def matmul_transposed(a: Tensor, b: Tensor, onednn: frozenset[str] = MATMUL_KINDS) -> Tensor:
    """`a` [m, k] times `b` [n, k] transposed: [m, n]; not differentiable. `onednn`: those of MATMUL_KINDS that
    oneDNN computes.
    """
    return _onednn(a, b, None) if uses_onednn(a, b, onednn) else a @ b.t()


def add_grad_weight(
    out: Tensor, grad: Tensor, x: Tensor, accumulate: bool = True, onednn: frozenset[str] = MATMUL_KINDS
) -> None:
    """Add the weight gradient gradᵀ·x, for `grad` [t, out] and `x` [t, in] of one dtype, to `out` fp32 [out, in], or
    overwrite it unless `accumulate`; `onednn` as for `matmul_transposed`.

    On a GPU the matmul itself accumulates into `out`.
    """
    if out.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, grad.t(), x, torch.float32, beta=int(accumulate), out=out)
    else:
        add_or_copy(out, grad_weight(grad, x, onednn), accumulate)


def add_or_copy(out: Tensor, x: Tensor, accumulate: bool) -> None:
    """Add `x` to `out`, or overwrite it unless `accumulate`."""
    if accumulate:
        out.add_(x)
    else:
        out.copy_(x)


def grad_weight(grad: Tensor, x: Tensor, onednn: frozenset[str] = MATMUL_KINDS) -> Tensor:
    """Compute gradᵀ·x [out, in]; `onednn` as for `matmul_transposed`. oneDNN copies its first operand, so the narrower
    one comes first.
    """
    if grad.shape[1] > x.shape[1]:
        return matmul_transposed(x.t(), grad.t(), onednn).t()
    return matmul_transposed(grad.t(), x.t(), onednn)


def measure_onednn() -> frozenset[str]:
    """Measure which of MATMUL_KINDS oneDNN computes faster than MKL; takes about 0.2 s of one core."""
    libraries = (MATMUL_KINDS, frozenset[str]())
    return frozenset(
        kind for kind, operands in _examples() if fastest(libraries, _timer(*operands), rounds=_ROUNDS, margin=_MARGIN)
    )


def measured_key() -> Key:
    """Return what the result of `measure_onednn` depends on."""
    built_with = torch.__config__.show().splitlines()
    decisive = ("Math Kernel Library", "MKL-DNN", "CPU capability")
    return {
        "what": "fp32-matmul",
        "sizes": str(_SIZES),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "libraries": "; ".join(line.strip(" -") for line in built_with if any(word in line for word in decisive)),
    }


def parse_onednn(kinds: Iterable[str]) -> frozenset[str]:
    """Return `kinds` as read from a file. Raises: ValueError, TypeError: they are not of MATMUL_KINDS."""
    if not (found := frozenset(kinds)) <= MATMUL_KINDS:
        raise ValueError(f"{sorted(found)} are not all of {sorted(MATMUL_KINDS)}")
    return found


def has_onednn() -> bool:
    """Whether PyTorch includes oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def uses_onednn(x: Tensor, weight: Tensor, onednn: frozenset[str] = MATMUL_KINDS) -> bool:
    """Whether oneDNN is used: on a CPU, for fp32 matmuls of the kinds `onednn` but the smallest, if PyTorch has it, and
    not under torch.compile.
    """
    rows = x.numel() // max(1, x.shape[-1])
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and rows >= _MIN_ROWS
        and rows * weight.numel() >= _MIN_MULTIPLICATIONS
        and has_onednn()
        and _kind(x, weight, rows) in onednn
    )


def _kind(a: Tensor, b: Tensor, rows: int) -> str:
    """The kind, by the layout of the operands: both are row-major in the forward, and none for a weight gradient."""
    size = "large" if rows * b.numel() >= _LARGE else "small"
    return f"{size} {_PASSES[0 if b.stride(-1) == 1 else 1 if a.stride(-1) == 1 else 2]}"


def _examples() -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield a kind, and operands of `matmul_transposed` of that kind."""
    for size, (tokens, outputs, inputs) in _SIZES.items():
        grad, weight, x = torch.ones(tokens, outputs), torch.ones(outputs, inputs), torch.ones(tokens, inputs)
        for of_pass, operands in zip(_PASSES, ((x, weight), (grad, weight.t()), (grad.t(), x.t())), strict=True):
            yield f"{size} {of_pass}", operands


def _timer(a: Tensor, b: Tensor) -> Callable[[frozenset[str]], float]:
    # of one thread the time that it computes, which other load on the machine hardly changes
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(onednn: frozenset[str]) -> float:
        started = clock()
        matmul_transposed(a, b, onednn)
        return clock() - started

    return seconds


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN's reordering of a strided weight takes seconds
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)  # [t, out]
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            matmul_transposed(grad, weight.t()).view(x.shape) if need_x else None,
            grad_weight(grad, x.flatten(0, -2)) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )

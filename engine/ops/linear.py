"""Linear layers, y = x·Wᵀ + b, and the matmuls of their gradients.

On a CPU, PyTorch's fp32 matmuls use MKL, which uses only half of the vector width on processors of other vendors than
Intel. oneDNN, which PyTorch also includes, uses all of it (twice as fast on an AMD EPYC with AVX-512) and needs no copy
of transposed operands; small matmuls use MKL, which has less overhead per call. Alternatives considered: 1×1
convolutions, the public API of oneDNN (their gradients are slower than MKL's), and the settings of
`torch.backends.mkldnn` (global, and they lower the precision if the processor supports it).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIN_ROWS = 16  # below, oneDNN's reordering of the weight takes longer than it saves
_MIN_MULTIPLICATIONS = 2**21  # below, its overhead per call of about 15 µs dominates


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times `weight` [out, in] transposed, plus `bias` [out]: [..., out]."""
    if uses_onednn(x, weight):
        return _OneDnnLinear.apply(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Reference of `linear`: PyTorch's `F.linear`."""
    return F.linear(x, weight, bias)


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """`a` [m, k] times `b` [n, k] transposed: [m, n], with the fastest implementation; not differentiable."""
    return _onednn(a, b, None) if uses_onednn(a, b) else a @ b.t()


def add_grad_weight(out: Tensor, grad: Tensor, x: Tensor, accumulate: bool = True) -> None:
    """Add the weight gradient gradᵀ·x, for `grad` [t, out] and `x` [t, in] of one dtype, to `out` fp32 [out, in], or
    overwrite it unless `accumulate`.

    On a GPU the matmul itself accumulates into `out`.
    """
    if out.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, grad.t(), x, torch.float32, beta=int(accumulate), out=out)
    else:
        add_or_copy(out, grad_weight(grad, x), accumulate)


def add_or_copy(out: Tensor, x: Tensor, accumulate: bool) -> None:
    """Add `x` to `out`, or overwrite it unless `accumulate`."""
    if accumulate:
        out.add_(x)
    else:
        out.copy_(x)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Compute gradᵀ·x [out, in]. oneDNN copies its first operand, so the narrower one comes first."""
    if grad.shape[1] > x.shape[1]:
        return matmul_transposed(x.t(), grad.t()).t()
    return matmul_transposed(grad.t(), x.t())


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is used: for large fp32 matmuls on a CPU, if PyTorch has it, and not under torch.compile."""
    rows = x.numel() // max(1, x.shape[-1])
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and rows >= _MIN_ROWS
        and rows * weight.numel() >= _MIN_MULTIPLICATIONS
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


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

"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm over the last dimension.

Statistics are fp32 (or wider) whatever the dtype of the input; eps sits inside the square root; the result is
rounded once, after the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension: `x` [..., h], `weight` [h]."""
    if uses_fewer_passes(x):
        return _RmsNorm.apply(x, weight, eps)
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _widened(x)
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normalised * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias, over the last dimension."""
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = _widened(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normalised * weight + bias).to(x.dtype)


def uses_fewer_passes(x: Tensor) -> bool:
    """The rule: PyTorch's own RMSNorm is one kernel on a GPU and five passes over memory on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RmsNorm(torch.autograd.Function):
    """Three passes forward, and a backward that keeps the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _widened(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = _widened(grad_outputs[0])
        normalised = x * inverse
        product = grad * normalised
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight.to(product.dtype)).div_(-x.shape[-1])[..., None]
        grad_x = (grad * weight).addcmul_(normalised, mean).mul_(inverse)
        return grad_x.to(x.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None

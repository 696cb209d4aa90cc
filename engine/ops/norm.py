"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm over the last dimension, alone or behind a residual sum.

Statistics are fp32 (or wider) whatever the dtype of the input; eps sits inside the square root; the result is
rounded once, after the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import native
from engine.ops.quantize import Fp8Activation, Fp8Output, carrier_of

Implementation = Literal["auto", "triaxis", "torch", "apex", "te"]


@dataclass(frozen=True)
class NormOptions:
    """Variants that models are published with.

    Attributes:
        zero_centered: the weight is kept as its distance from 1 (Gemma).
        hf_rounding: the normalised value is rounded to the dtype of the input before it meets the weight, as Hugging
            Face's Llama does.
        memory_efficient: keep the output for the backward pass, which whoever reads it keeps anyway, and not the input;
            for weights that stay away from 0. The kernels alone do so; elsewhere it changes nothing.
    """

    zero_centered: bool = False
    hf_rounding: bool = False
    memory_efficient: bool = False


_PLAIN = NormOptions()


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, options: NormOptions = _PLAIN, by: Implementation = "auto"
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension: `x` [..., h], `weight` [h]."""
    if _by_kernel(x, weight, by):
        return _KernelNorm.apply(x, None, weight, None, eps, options)[0]
    if by in ("apex", "te"):
        return _by_package(by, x, weight, None, eps, options)
    if options.zero_centered or options.hf_rounding:
        return rms_norm_reference(x, weight, eps, options)
    if uses_fewer_passes(x):
        return _RmsNorm.apply(x, weight, eps)
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, options: NormOptions = _PLAIN, by: Implementation = "auto"
) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias, over the last dimension."""
    if _by_kernel(x, weight, by):
        return _KernelNorm.apply(x, None, weight, bias, eps, options)[0]
    if by in ("apex", "te"):
        return _by_package(by, x, weight, bias, eps, options)
    if x.dtype == weight.dtype and not options.zero_centered and not options.hf_rounding:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps, options)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    options: NormOptions = _PLAIN,
    by: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual (LayerNorm with a bias, else RMSNorm), and that sum; one pass over memory on a GPU."""
    if _by_kernel(x, weight, by):
        return _KernelNorm.apply(x, residual, weight, bias, eps, options)
    total = x + residual
    if bias is None:
        return rms_norm(total, weight, eps, options, by), total
    return layer_norm(total, weight, bias, eps, options, by), total


def norm_to_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, output: Fp8Output
) -> tuple[Fp8Activation, Tensor]:
    """The norm of x [t, h] (or of x + residual) in FP8, and that sum; where `output.possible`."""
    carrier, total, values, scales = _KernelNorm.apply(x, residual, weight, bias, eps, _PLAIN, output)
    return Fp8Activation(output.quantised(values, scales), carrier), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, options: NormOptions = _PLAIN) -> Tensor:
    wide = _widened(x)
    return _scaled(x, wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps), weight, options).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, options: NormOptions = _PLAIN) -> Tensor:
    wide = _widened(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (_scaled(x, normalised, weight, options) + bias).to(x.dtype)


def _by_kernel(x: Tensor, weight: Tensor, by: Implementation) -> bool:
    return by in ("auto", "triaxis") and native.runs(x) and x.dtype == weight.dtype


def _by_package(
    by: Implementation, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, options: NormOptions
) -> Tensor:
    """apex or Transformer Engine, which `require_implementations` has found."""
    if options.hf_rounding or (options.zero_centered and by == "apex"):
        raise ValueError(f"ops.norm = {by} has no {options}")
    if by == "te":
        return _te_norm(bias is not None, weight.shape[0], eps, options.zero_centered)(x, weight, bias)
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    keep = {"memory_efficient": options.memory_efficient}
    if bias is None:
        return fused_rms_norm_affine(x, weight, weight.shape, eps, **keep)
    return fused_layer_norm_affine(x, weight, bias, weight.shape, eps, **keep)


@cache
def _te_norm(centered: bool, hidden_size: int, eps: float, zero_centered: bool) -> Callable[..., Tensor]:
    """Transformer Engine's module, called with our parameters instead of its own."""
    import transformer_engine.pytorch as te

    module = (te.LayerNorm if centered else te.RMSNorm)(hidden_size, eps=eps, zero_centered_gamma=zero_centered)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(module, given, (x,))

    return call


def uses_fewer_passes(x: Tensor) -> bool:
    """The rule where there is no kernel: PyTorch's own RMSNorm is five passes over memory on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _scaled(x: Tensor, normalised: Tensor, weight: Tensor, options: NormOptions) -> Tensor:
    if options.hf_rounding:
        normalised = normalised.to(x.dtype).to(normalised.dtype)
    return normalised * (weight.to(normalised.dtype) + 1 if options.zero_centered else weight)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _KernelNorm(torch.autograd.Function):
    """The compiled kernels: (x, residual or None, weight, bias or None) -> (norm, sum)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        options: NormOptions,
        output: Fp8Output | None = None,
    ) -> tuple[Tensor, ...]:
        flat = None if residual is None else residual.reshape(-1, x.shape[-1])
        centered = bias is not None
        given = (
            x.reshape(-1, x.shape[-1]),
            flat,
            weight,
            bias,
            eps,
            centered,
            options.zero_centered,
            options.hf_rounding,
        )
        quantised: tuple[Tensor, ...] = ()
        if output is None:
            y, total, mean, rstd = torch.ops.triaxis.norm_forward(*given)
            y = y.view(x.shape)
        else:
            *quantised, total, mean, rstd = torch.ops.triaxis.norm_forward_fp8(*given, *output.arguments)
            y = carrier_of(x, x.shape)
        total = x if residual is None else total.view(x.shape)
        ctx.save_for_backward(y if options.memory_efficient else total, weight, bias, mean, rstd)
        ctx.options, ctx.has_residual = options, residual is not None
        ctx.takers = [_taker(parameter) for parameter in (weight, bias)]
        ctx.set_materialize_grads(False)
        if residual is None:
            total = x.new_empty(0)
        ctx.mark_non_differentiable(*([total] if residual is None else []), *quantised)
        return y, total, *quantised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, weight, bias, mean, rstd = ctx.saved_tensors
        grad_y, grad_sum = grad_outputs[:2]
        if grad_y is None:
            grad_y = torch.zeros_like(saved)
        h = grad_y.shape[-1]
        grad_x, grad_weight, grad_bias = torch.ops.triaxis.norm_backward(
            grad_y.reshape(-1, h),
            None if grad_sum is None or not ctx.has_residual else grad_sum.reshape(-1, h),
            saved.reshape(-1, h),
            weight,
            bias,
            mean,
            rstd,
            bias is not None,
            ctx.options.zero_centered,
            ctx.options.hf_rounding,
            ctx.options.memory_efficient,
        )
        grad_x = grad_x.view(grad_y.shape)
        gradients = [
            _given(take, gradient) if needed else None
            for take, gradient, needed in zip(
                ctx.takers, (grad_weight, grad_bias), ctx.needs_input_grad[2:4], strict=True
            )
        ]
        return grad_x, grad_x if ctx.has_residual else None, *gradients, None, None, None


def _given(take: Callable[[Tensor], None] | None, gradient: Tensor) -> Tensor | None:
    if take is None:
        return gradient
    take(gradient)
    return None


def _taker(parameter: Tensor | None) -> Callable[[Tensor], None] | None:
    """How a parameter takes its fp32 gradient itself, where autograd would round it to the parameter's dtype."""
    return None if torch.compiler.is_compiling() else getattr(parameter, "add_gradient", None)


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

"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm over the last dimension, also with a residual add.

Statistics are in fp32 (or wider) for any input dtype; eps is inside the square root; the result is rounded once, after
multiplication by the weight. Kernels and packages take weights of the input's dtype only; with others, like 1 + weight
in fp32, a norm is plain PyTorch.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config.schema import NormImpl
from engine.ops import native
from engine.ops.quantize import ActivationWithAmax, AmaxOutput, Fp8Activation, Fp8Output, carrier_of

NormSink = Callable[[Callable[[Sequence[Tensor], bool], Tensor]], Tensor]
"""Calls a function with the fp32 main gradients of weight and, of a LayerNorm, bias, and with whether to accumulate
into them or to overwrite them; returns its result. Without one, or without a kernel, the gradients go to autograd,
which rounds them to the parameters' dtype."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: NormImpl = "auto", sink: NormSink | None = None) -> Tensor:
    """RMSNorm, x / sqrt(mean(x²) + eps) · weight, over the last dimension: `x` [..., h], `weight` [h]."""
    if _uses_kernel(x, weight, impl):
        return _KernelNorm.apply(x, None, weight, None, eps, sink)[0]
    if impl in ("apex", "te") and x.dtype == weight.dtype:
        return _package_norm(impl, x, weight, None, eps)
    if uses_fewer_passes(x, weight):
        return _RmsNorm.apply(x, weight, eps, None)
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: NormImpl = "auto", sink: NormSink | None = None
) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias, over the last dimension."""
    if _uses_kernel(x, weight, impl):
        return _KernelNorm.apply(x, None, weight, bias, eps, sink)[0]
    if impl in ("apex", "te"):
        return _package_norm(impl, x, weight, bias, eps)
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    impl: NormImpl = "auto",
    sink: NormSink | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual (LayerNorm with a bias, else RMSNorm) and the sum; one memory pass on a GPU."""
    if _uses_kernel(x, weight, impl):
        return _KernelNorm.apply(x, residual, weight, bias, eps, sink)
    total = x + residual
    if bias is None:
        return rms_norm(total, weight, eps, impl, sink), total
    return layer_norm(total, weight, bias, eps, impl, sink), total


def norm_for_fp8(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    output: Fp8Output | AmaxOutput,
    sink: NormSink | None = None,
) -> tuple[Fp8Activation | ActivationWithAmax, Tensor]:
    """Return the norm of x [t, h] (or of x + residual), in FP8 or with its amax, and the sum; by the kernel. FP8
    requires `output.supports`.
    """
    y, total, *quantized = _KernelNorm.apply(x, residual, weight, bias, eps, sink, output)
    total = x if residual is None else total
    if isinstance(output, AmaxOutput):
        return ActivationWithAmax(y, output.amax), total
    return Fp8Activation(output.quantized(*quantized), y), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch, computed in fp32 or wider; `x` [..., h]."""
    wide = _widened(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def sharded_rms_norm(x: Tensor, weight: Tensor, eps: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """RMSNorm of features that are sharded over ranks, in plain PyTorch: `x` [t, h/n], `weight` [h/n].

    `mean` turns this rank's sums over its features, [t, 1], into means over all features.
    """
    return _RmsNorm.apply(x, weight, eps, mean)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` in plain PyTorch, computed in fp32 or wider; `x` [..., h]."""
    wide = _widened(x)
    centered = wide - wide.mean(-1, keepdim=True)
    normalized = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    return (normalized * weight + bias).to(x.dtype)


def _uses_kernel(x: Tensor, weight: Tensor, impl: NormImpl) -> bool:
    return impl in ("auto", "triaxis") and native.runs(x) and x.dtype == weight.dtype


def _package_norm(impl: NormImpl, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Norm of apex or Transformer Engine; `require_implementations` has checked that it is installed."""
    if impl == "te":
        return _te_norm(bias is not None, weight.shape[0], eps)(x, weight, bias)
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    if bias is None:
        return fused_rms_norm_affine(x, weight, weight.shape, eps)
    return fused_layer_norm_affine(x, weight, bias, weight.shape, eps)


@cache
def _te_norm(centered: bool, hidden_size: int, eps: float) -> Callable[..., Tensor]:
    """Transformer Engine's module as a function of (x, weight, bias)."""
    import transformer_engine.pytorch as te

    module = (te.LayerNorm if centered else te.RMSNorm)(hidden_size, eps=eps)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(module, given, (x,))

    return call


def uses_fewer_passes(x: Tensor, weight: Tensor) -> bool:
    """Whether `_RmsNorm` is used: on a CPU, where PyTorch's makes five passes over memory, and for a weight of another
    dtype, which PyTorch's does not take; not under torch.compile.
    """
    return (x.device.type == "cpu" or x.dtype != weight.dtype) and not torch.compiler.is_compiling()


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _KernelNorm(torch.autograd.Function):
    """Kernels: (x, residual or None, weight, bias or None) -> (norm, sum[, values and scale_inv of the norm])."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        sink: NormSink | None,
        output: Fp8Output | AmaxOutput | None = None,
    ) -> tuple[Tensor, ...]:
        h = x.shape[-1]
        given = (
            x.reshape(-1, h),
            None if residual is None else residual.reshape(-1, h),
            weight,
            bias,
            eps,
            bias is not None,
        )
        quantized: tuple[Tensor, ...] = ()
        if isinstance(output, Fp8Output):
            *quantized, total, mean, rstd = torch.ops.triaxis.norm_forward_fp8(*given, *output.arguments)
            y = carrier_of(x, x.shape)
        else:
            amax = None if output is None else output.amax
            y, total, mean, rstd = torch.ops.triaxis.norm_forward(*given, amax)
            y = y.view(x.shape)
        total = x if residual is None else total.view(x.shape)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
        ctx.sink = None if torch.compiler.is_compiling() else sink
        ctx.set_materialize_grads(False)
        if residual is None:
            total = x.new_empty(0)
        ctx.mark_non_differentiable(*([total] if residual is None else []), *quantized)
        return y, total, *quantized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        grad_y, grad_sum = grad_outputs[:2]
        if grad_y is None:
            grad_y = torch.zeros_like(total)
        h = grad_y.shape[-1]
        grad_sum = None if grad_sum is None or not ctx.has_residual else grad_sum.reshape(-1, h)
        given = (grad_y.reshape(-1, h), grad_sum, total.reshape(-1, h), weight, mean, rstd, ctx.has_bias)
        backward = torch.ops.triaxis.norm_backward
        grad_weight = grad_bias = None
        if ctx.sink is None:
            grad_x, grad_weight, grad_bias = backward(*given)
        else:
            grad_x = ctx.sink(lambda main_grads, accumulate: backward(*given, accumulate, *main_grads)[0])
        grad_x = grad_x.view(grad_y.shape)
        grad_bias = grad_bias if ctx.has_bias else None
        return grad_x, grad_x if ctx.has_residual else None, grad_weight, grad_bias, None, None, None


class _RmsNorm(torch.autograd.Function):
    """RMSNorm with three passes over memory in the forward pass; saves the input and one value per row. `mean`: see
    `sharded_rms_norm`; None if the features are not sharded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, mean: Callable[[Tensor], Tensor] | None) -> Tensor:
        size = x.shape[-1]
        ctx.mean = mean or (lambda sums: sums.div_(size))
        wide = _widened(x)
        mean_square = ctx.mean(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_())
        inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = _widened(grad_outputs[0])
        normalized = x * inverse
        product = grad * normalized
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = ctx.mean((product @ weight.to(product.dtype))[..., None])
        grad_x = (grad * weight).addcmul_(normalized, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None, None

"""SwiGLU: silu(gate) · up, and GeGLU: gelu(gate) · up (Shazeer, arXiv 2002.05202), with gate and up concatenated in one
tensor. Only SwiGLU has kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import native
from engine.ops.quantize import (
    BLOCK_1X128,
    BLOCK_SIZE,
    TENSORWISE,
    ActivationWithAmax,
    AmaxOutput,
    Fp8Activation,
    Fp8Output,
    GradHandover,
    carrier_of,
)


def swiglu(gate_up: Tensor, handover: GradHandover | None = None) -> Tensor:
    """SwiGLU of `gate_up` [..., 2f], gate first: [..., f]. `handover`: of the gradient of `gate_up`, by the kernel."""
    if native.runs(gate_up):
        return _KernelSwiGlu.apply(gate_up, None, handover)
    assert handover is None
    if uses_recompute(gate_up):
        return _Glu.apply(gate_up, F.silu, torch.ops.aten.silu_backward.grad_input)
    return swiglu_reference(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """GeGLU of `gate_up` [..., 2f], gate first, with the tanh approximation of GELU: [..., f]."""
    if uses_recompute(gate_up):
        return _Glu.apply(gate_up, _gelu, partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"))
    return geglu_reference(gate_up)


def swiglu_for_fp8(
    gate_up: Tensor, output: Fp8Output | AmaxOutput, handover: GradHandover | None = None
) -> Fp8Activation | ActivationWithAmax:
    """SwiGLU of `gate_up` [t, 2f], in FP8 or with its amax: [t, f]; by the kernel. FP8 requires `output.supports`, and
    with one scale, in training, is transposed too: the row-parallel layer that follows has all tokens.
    """
    if isinstance(output, AmaxOutput):
        return ActivationWithAmax(_KernelSwiGlu.apply(gate_up, output.amax, handover), output.amax)
    transposed = output.scaling == TENSORWISE and torch.is_grad_enabled()
    carrier, values, values_t, scale_inv = _KernelSwiGluFp8.apply(gate_up, output, transposed, handover)
    both = output.quantized(values, scale_inv), output.quantized(values_t, scale_inv) if transposed else None
    return Fp8Activation(both[0], carrier, both[1])


def swiglu_hands_over(output: Fp8Output | AmaxOutput, columns: int) -> bool:
    """Whether the kernel can hand over the gradient of `gate_up`, which has `columns` features, as `output` says: no
    block of a row may have elements of both halves.
    """
    in_blocks = isinstance(output, Fp8Output) and output.scaling == BLOCK_1X128
    return not in_blocks or columns // 2 % BLOCK_SIZE == 0


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of `gate_up` [..., 2f] in plain PyTorch: [..., f]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def geglu_reference(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up of `gate_up` [..., 2f] in plain PyTorch: [..., f]."""
    gate, up = gate_up.chunk(2, -1)
    return _gelu(gate) * up


def uses_recompute(gate_up: Tensor) -> bool:
    """Whether `_Glu` is used without a kernel: always, except under torch.compile, which fuses the reference."""
    return not torch.compiler.is_compiling()


class _KernelSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, amax: Tensor | None, handover: GradHandover | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.handover = handover
        ops, flat = torch.ops.triaxis, gate_up.reshape(-1, gate_up.shape[-1])
        out = ops.swiglu_forward(flat) if amax is None else ops.swiglu_forward_amax(flat, amax)
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        grad = grad_outputs[0]
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        return _kernel_backward(grad.reshape(-1, grad.shape[-1]), flat, ctx.handover).view(gate_up.shape), None, None


class _KernelSwiGluFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, output: Fp8Output, transposed: bool, handover: GradHandover | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gate_up)
        ctx.handover = handover
        ctx.set_materialize_grads(False)
        in_fp8 = torch.ops.triaxis.swiglu_forward_fp8(gate_up, *output.arguments, transposed)
        ctx.mark_non_differentiable(*in_fp8)
        return carrier_of(gate_up, in_fp8[0].shape), *in_fp8

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad_outputs[0] is None:
            return None, None, None, None
        (gate_up,) = ctx.saved_tensors
        return _kernel_backward(grad_outputs[0], gate_up, ctx.handover), None, None, None


def _kernel_backward(grad: Tensor, gate_up: Tensor, handover: GradHandover | None) -> Tensor:
    ops = torch.ops.triaxis
    if handover is None:
        return ops.swiglu_backward(grad, gate_up)
    return handover.compute(ops.swiglu_backward_amax, ops.swiglu_backward_fp8, (grad, gate_up), gate_up.shape)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class _Glu(torch.autograd.Function):
    """activation(gate) · up that saves only its input, and writes both gradients into one tensor. `backward`: of the
    activation: (gradient, its input, grad_input=the result).
    """

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, activation: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.activation_backward = activation, backward
        gate, up = gate_up.chunk(2, -1)
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        grad = grad_outputs[0]
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        scratch = ctx.activation(gate)
        torch.mul(grad, scratch, out=grad_up)
        torch.mul(grad, up, out=scratch)
        ctx.activation_backward(scratch, gate, grad_input=grad_gate)
        return out, None, None

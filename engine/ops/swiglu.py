"""SwiGLU: silu(gate) · up (Shazeer, arXiv 2002.05202), with gate and up concatenated in one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import native
from engine.ops.quantize import ActivationWithAmax, AmaxOutput, Fp8Activation, Fp8Output, carrier_of


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU of `gate_up` [..., 2f], gate first: [..., f]."""
    if native.runs(gate_up):
        return _KernelSwiGlu.apply(gate_up)
    if uses_recompute(gate_up):
        return _SwiGlu.apply(gate_up)
    return swiglu_reference(gate_up)


def swiglu_for_fp8(gate_up: Tensor, output: Fp8Output | AmaxOutput) -> Fp8Activation | ActivationWithAmax:
    """SwiGLU of `gate_up` [t, 2f], in FP8 or with its amax: [t, f]; by the kernel. FP8 requires `output.supports`."""
    if isinstance(output, AmaxOutput):
        return ActivationWithAmax(_KernelSwiGlu.apply(gate_up, output.amax), output.amax)
    carrier, values, scale_inv = _KernelSwiGluFp8.apply(gate_up, output)
    return Fp8Activation(output.quantized(values, scale_inv), carrier)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of `gate_up` [..., 2f] in plain PyTorch: [..., f]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def uses_recompute(gate_up: Tensor) -> bool:
    """Whether `_SwiGlu` is used without a kernel: always, except under torch.compile, which fuses the reference."""
    return not torch.compiler.is_compiling()


class _KernelSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, amax: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(gate_up)
        out = torch.ops.triaxis.swiglu_forward(gate_up.reshape(-1, gate_up.shape[-1]), amax)
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad = grad_outputs[0]
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        return torch.ops.triaxis.swiglu_backward(grad.reshape(-1, grad.shape[-1]), flat).view(gate_up.shape), None


class _KernelSwiGluFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, output: Fp8Output) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gate_up)
        ctx.set_materialize_grads(False)
        values, scale_inv = torch.ops.triaxis.swiglu_forward_fp8(gate_up, *output.arguments)
        ctx.mark_non_differentiable(values, scale_inv)
        return carrier_of(gate_up, values.shape), values, scale_inv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_outputs[0] is None:
            return None, None
        return torch.ops.triaxis.swiglu_backward(grad_outputs[0], *ctx.saved_tensors), None


class _SwiGlu(torch.autograd.Function):
    """SwiGLU that saves only its input, and writes both gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        (gate_up,) = ctx.saved_tensors
        grad = grad_outputs[0]
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        scratch = F.silu(gate)
        torch.mul(grad, scratch, out=grad_up)
        torch.mul(grad, up, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=grad_gate)
        return (out,)

"""Rotary position embeddings in the half-rotation convention of Hugging Face Llama: element i pairs with i + d/2.

Source: Su et al., RoFormer (arXiv 2104.09864); the Llama-3 frequency scaling as published with Llama 3.1.
The rotation is linear and its transpose is the inverse rotation, so the backward pass needs only the tables.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config.schema import RopeScaling
from engine.ops import native
from engine.ops.quantize import AmaxOutput, Fp8Output, GradHandover


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the angles at `positions` [t]: two fp32 tensors [t, head_dim/2]."""
    return tables_at(positions, rope_frequencies(head_dim, theta, scaling, positions.device))


def tables_at(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_tables` for the result of `rope_frequencies`, which is the same in every microbatch."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Angles of neighboring positions: fp32 [head_dim/2]."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    # Frequencies with wavelengths up to original/high are kept, those above original/low are divided by `factor`,
    # and those in between are interpolated.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [t, n, d] by the angles of the fp32 tables `cos`, `sin` [t, d/2].

    Computed in fp32, returned contiguous and in the dtype of `x`.
    """
    if native.runs(x):
        return _KernelRotate.apply(x, cos, sin)
    if uses_in_place(x):
        return _Rotate.apply(x, cos, sin)
    return apply_rope_reference(x, cos, sin)


def apply_rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, handover: GradHandover | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split `qkv` [t, n + 2 n_kv, d] and rotate: queries [t, n, d], keys and values [t, n_kv, d]; one pass on a GPU.
    `handover`: of the gradient of `qkv`, by the kernel.
    """
    if native.runs(qkv):
        return _KernelRotateQkv.apply(qkv, cos, sin, kv_heads, handover)
    assert handover is None
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def rope_hands_over(output: Fp8Output | AmaxOutput, head_dim: int) -> bool:
    """Whether the kernel can hand over the gradient of q, k and v as `output` says: in FP8, if heads fill blocks of 128
    elements.
    """
    return isinstance(output, AmaxOutput) or head_dim in (16, 32, 64, 128)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` in plain PyTorch, computed in fp32 or wider: `x` [t, n, d], `cos` and `sin` [t, d/2]."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def uses_in_place(x: Tensor) -> bool:
    """Whether `_Rotate` is used: on a CPU, each half is written directly to the output; not under torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _KernelRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.triaxis.rope(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.triaxis.rope(grad_outputs[0], *ctx.saved_tensors, True), None, None


class _KernelRotateQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, handover: GradHandover | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.handover = qkv.shape, handover
        q, k = torch.ops.triaxis.rope_qk(qkv, cos, sin, kv_heads)
        return q, k, qkv[:, qkv.shape[1] - kv_heads :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ops, arguments = torch.ops.triaxis, (*grad_outputs, *ctx.saved_tensors)
        if ctx.handover is None:
            grad = ops.rope_qk_backward(*arguments)
        else:
            grad = ctx.handover.compute(ops.rope_qk_backward_amax, ops.rope_qk_backward_fp8, arguments, ctx.shape)
        return grad, None, None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotate (`sign` 1), or rotate back (−1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = torch.empty(x.shape, dtype=wide.dtype, device=x.device)
    cos, sin = cos[:, None], sin[:, None]
    first, second = wide.chunk(2, -1)
    first_out, second_out = out.chunk(2, -1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)

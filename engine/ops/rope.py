"""Rotary position embeddings in the half-rotation convention of Hugging Face Llama: element i pairs with i + d/2.

Source: Su et al., RoFormer (arXiv 2104.09864); the scalings: see `RopeScaling`, and Llama 3.1.
The rotation is linear and its transpose is the inverse rotation, so the backward pass needs only the tables.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config.schema import RopeScaling
from engine.ops import native
from engine.ops.quantize import AmaxOutput, Fp8Output, GradHandover


@dataclass(frozen=True)
class RopeFrequencies:
    """Angles of neighboring positions, for heads of which d features are rotated.

    Attributes:
        values: fp32 [d/2].
        scale: factor of cosines and sines.
        long_values: fp32 [d/2], those of documents of more than `long_from` tokens; None if they have the same.
    """

    values: Tensor
    scale: float = 1.0
    long_values: Tensor | None = None
    long_from: int = 0


def rope_tables(
    positions: Tensor, size: int, theta: float, scaling: RopeScaling | None = None, max_position: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the angles at `positions` [t]: two fp32 tensors [t, size/2]."""
    return tables_at(positions, rope_frequencies(size, theta, scaling, max_position, positions.device))


def tables_at(positions: Tensor, frequencies: RopeFrequencies) -> tuple[Tensor, Tensor]:
    """`rope_tables` for the result of `rope_frequencies`, which is the same in every microbatch."""
    values = frequencies.values
    if frequencies.long_values is not None:
        is_long = _document_lengths(positions)[:, None] > frequencies.long_from
        values = torch.where(is_long, frequencies.long_values, values)  # [t, d/2]
    angles = positions.float()[:, None] * values
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if frequencies.scale == 1 else (cos * frequencies.scale, sin * frequencies.scale)


def _document_lengths(positions: Tensor) -> Tensor:
    """For each token, the last of its run of consecutive positions, plus 1: [t]. Does not wait for a device."""
    starts = F.pad((positions[1:] != positions[:-1] + 1).long(), (1, 0))
    document = starts.cumsum(0)[: len(positions)]
    return torch.zeros_like(positions).scatter_reduce(0, document, positions + 1, "amax")[document]


def rope_frequencies(
    size: int, theta: float, scaling: RopeScaling | None, max_position: int, device: torch.device
) -> RopeFrequencies:
    """Frequencies of heads of which `size` features are rotated.

    The scalings are those of transformers' `modeling_rope_utils.py`. "dynamic" changes nothing up to `max_position`,
    and training data is not longer.
    """
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.rope_type == "dynamic":
        return RopeFrequencies(frequencies)
    factor, original = scaling.factor or max_position / scaling.original_max_position, scaling.original_max_position
    if scaling.rope_type == "linear":
        return RopeFrequencies(frequencies / factor)
    if scaling.rope_type == "longrope":
        scale = scaling.attention_factor or math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        short, long = (
            1.0 / (torch.tensor(divisors, device=device, dtype=torch.float32) * theta**exponents)
            for divisors in (scaling.short_factor or (), scaling.long_factor or ())
        )
        return RopeFrequencies(short, scale, long, original)
    if scaling.rope_type == "yarn":
        keep = _yarn_kept(scaling, size, theta).to(device)
        scale = scaling.attention_factor or 0.1 * math.log(max(factor, 1)) + 1.0
        return RopeFrequencies(frequencies * (keep + (1 - keep) / factor), scale)
    # Frequencies with wavelengths up to original/high are kept, those above original/low are divided by `factor`,
    # and those in between are interpolated.
    turns = original * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return RopeFrequencies(frequencies * (keep + (1 - keep) / factor))


def _yarn_kept(scaling: RopeScaling, size: int, theta: float) -> Tensor:
    """By frequency, the share that stays as it is: 1 for those of more than `beta_fast` periods in the original length,
    0 below `beta_slow`, linear between the indexes of the two.
    """
    first, last = (
        size * math.log(scaling.original_max_position / (periods * 2 * math.pi)) / (2 * math.log(theta))
        for periods in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
    return 1 - ramp.clamp(0, 1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r features of `x` [t, n, d] by the angles of the fp32 tables `cos`, `sin` [t, r/2].

    Computed in fp32, returned contiguous and in the dtype of `x`.
    """
    if (rotated := 2 * cos.shape[1]) < x.shape[2]:
        return torch.cat((apply_rope(x[..., :rotated].contiguous(), cos, sin), x[..., rotated:]), -1)
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
    if native.runs(qkv) and 2 * cos.shape[1] == qkv.shape[2]:
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

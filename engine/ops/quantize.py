"""Quantization to FP8 (E4M3 and E5M2: Micikevicius et al., arXiv 2209.05433) and its scales.

A quantized matrix consists of FP8 values and `scale_inv`, the dequantization factor: one per tensor, per 1 × 128 block
of a row, or per 128 × 128 block. Conversions saturate; NaN stays NaN.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native

Scaling = Literal["tensorwise", "block_1x128", "block_128x128"]
TENSORWISE: Final = "tensorwise"  # one scale per tensor
BLOCK_1X128: Final = "block_1x128"  # one per 128 elements of a row: activations and gradients
BLOCK_128X128: Final = "block_128x128"  # one per 128 × 128 block: weights
BLOCK_SIZE = 128

_MIN_AMAX = 1e-4  # so that a block of zeros has a finite scale


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix in FP8: values · scale_inv is the matrix that was quantized.

    Attributes:
        values: FP8 [m, k].
        scale_inv: fp32; TENSORWISE [1], BLOCK_1X128 [⌈k/128⌉, m], BLOCK_128X128 [⌈m/128⌉, ⌈k/128⌉ padded with zeros to
            a multiple of 4].
    """

    values: Tensor
    scale_inv: Tensor
    scaling: Scaling


@dataclass(frozen=True)
class Fp8Output:
    """E4M3 output spec of a fused operator; the fields are arguments of `quantize`."""

    scaling: Literal["tensorwise", "block_1x128"]
    scale: Tensor | None = None
    amax: Tensor | None = None
    power_of_two: bool = False

    def supports(self, x: Tensor, columns: int) -> bool:
        """Whether the kernels support an output with `columns` elements per row, computed from `x`."""
        vector = 16 // x.element_size()  # elements per 16-byte access; a block handles at most 2048 vectors of a row
        return native.runs(x) and columns % 16 == 0 and columns <= 2048 * vector and x.data_ptr() % 16 == 0

    @property
    def arguments(self) -> tuple[str, Tensor | None, Tensor | None, bool]:
        """The last arguments of the fused operators."""
        return self.scaling, self.scale, self.amax, self.power_of_two

    def quantized(self, values: Tensor, scale_inv: Tensor) -> QuantizedTensor:
        """Wrap the output of a fused operator, which returns no `scale_inv` for TENSORWISE."""
        return QuantizedTensor(values, scale_inv if self.scale is None else self.scale.reciprocal(), self.scaling)


@dataclass(frozen=True)
class Fp8Activation:
    """An activation [t, h] that exists only in FP8.

    Attributes:
        quantized: the FP8 values, which matmuls read.
        carrier: tensor without memory, of the activation's shape and dtype, to which autograd attaches the gradient.
    """

    quantized: QuantizedTensor
    carrier: Tensor


def carrier_of(like: Tensor, shape: torch.Size) -> Tensor:
    """Create a tensor of `shape`, with the dtype and device of `like`, that takes no memory."""
    return like.new_zeros(()).expand(shape)


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    *,
    row_major: bool = True,
    transposed: bool = False,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[QuantizedTensor | None, QuantizedTensor | None]:
    """Quantize `x` [m, k] to `dtype`: as [m, k] (`row_major`) and transposed to [k, m], each if requested.

    TENSORWISE multiplies x by `scale` (fp32, one element) and updates `amax` (fp32, one element) to at least max |x|.
    Scales per block are computed here; `power_of_two` rounds their `scale_inv` up to powers of two.

    Raises:
        ValueError: k (or m, for the transpose) is not a multiple of 16, which FP8 matmuls need.
    """
    rows, columns = x.shape
    if columns % 16 or (transposed and rows % 16):
        raise ValueError(f"[{rows}, {columns}] cannot be quantized: FP8 matmuls take multiples of 16")
    run = torch.ops.triaxis.quantize if native.runs(x) else quantize_reference
    values, values_t, scale_inv, scale_inv_t = run(x, dtype, scaling, row_major, transposed, scale, amax, power_of_two)
    if scaling == TENSORWISE:
        assert scale is not None
        scale_inv = scale_inv_t = scale.reciprocal()
    return (
        QuantizedTensor(values, scale_inv, scaling) if row_major else None,
        QuantizedTensor(values_t, scale_inv_t, scaling) if transposed else None,
    )


def quantize_reference(
    x: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    row_major: bool,
    transposed: bool,
    scale: Tensor | None,
    amax: Tensor | None,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of `triaxis::quantize` in PyTorch: values, their transpose, and the `scale_inv` of each; empty if not
    requested.
    """
    wide = x.float()
    no_values, no_scales = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
    if scaling == TENSORWISE:
        assert scale is not None
        if amax is not None and x.numel():
            torch.maximum(amax, wide.abs().amax().view_as(amax), out=amax)
        values = to_fp8(wide * scale, dtype)
        values_t = values.t().contiguous() if transposed else no_values
        return values if row_major else no_values, values_t, no_scales, no_scales
    (values, scale_inv), (values_t, scale_inv_t) = (
        _quantize_blocks(matrix, dtype, scaling, power_of_two) if requested else (no_values, no_scales)
        for requested, matrix in ((row_major, wide), (transposed, wide.t()))
    )
    return values, values_t, scale_inv, scale_inv_t


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest even, with saturation. PyTorch's conversion to E5M2 overflows to infinity."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def scale_inv_from_amax(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """Return the dequantization factor amax / max(dtype), which maps the largest FP8 value to `amax`.

    The same on every device: CUDA divides by a number as it multiplies by its reciprocal, so the divisor is a tensor;
    and its log2 of some powers of two is an ulp too large, so a billionth is taken off: fp32 numbers differ by more.
    """
    scale_inv = amax.clamp(min=_MIN_AMAX) / torch.full_like(amax, torch.finfo(dtype).max)
    return torch.exp2(torch.ceil(torch.log2(scale_inv.double()) - 1e-9)).float() if power_of_two else scale_inv


def _quantize_blocks(x: Tensor, dtype: torch.dtype, scaling: Scaling, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantize `x` [m, k] with scales per block: values [m, k] and their `scale_inv`."""
    rows, columns = x.shape
    height = BLOCK_SIZE if scaling == BLOCK_128X128 else 1
    padded = F.pad(x, (0, -columns % BLOCK_SIZE, 0, -rows % height))
    blocks = padded.view(-1, height, padded.shape[1] // BLOCK_SIZE, BLOCK_SIZE)  # [block rows, height, …, 128]
    amax = blocks.abs().amax((1, 3)).clamp(min=_MIN_AMAX)  # [block rows, block cols]
    scale_inv = scale_inv_from_amax(amax, dtype, power_of_two)
    scale = scale_inv.reciprocal() if power_of_two else torch.full_like(amax, torch.finfo(dtype).max).div_(amax)
    values = to_fp8(blocks * scale[:, None, :, None], dtype).view_as(padded)[:rows, :columns]
    if scaling == BLOCK_1X128:
        return values.contiguous(), scale_inv.t().contiguous()
    return values.contiguous(), F.pad(scale_inv, (0, -scale_inv.shape[1] % 4))

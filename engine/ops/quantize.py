"""Quantization to FP8 (E4M3 and E5M2: Micikevicius et al., arXiv 2209.05433) and its scales.

A quantized matrix consists of FP8 values and `scale_inv`, the dequantization factor: one per tensor, per 1 × 128 block
of a row, or per 128 × 128 block. Conversions saturate; NaN stays NaN.
"""

from collections.abc import Callable
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

# So that a block of zeros has a finite scale. Far below the gradients of a large batch, whose loss is a mean: with 4 M
# tokens a step, most blocks of 128 gradients are below 1e-4.
MIN_AMAX = 1e-30


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
    """FP8 output spec of a fused operator; blocks have scales that are powers of two. Activations are E4M3; gradients
    are E5M2, with scales per block E4M3.

    Attributes:
        scale, scale_inv: fp32 [1], for TENSORWISE.
        amax: fp32 [1], raised to at least the largest |output|; TENSORWISE.
    """

    scaling: Literal["tensorwise", "block_1x128"]
    scale: Tensor | None = None
    scale_inv: Tensor | None = None
    amax: Tensor | None = None

    def supports(self, x: Tensor, columns: int) -> bool:
        """Whether the kernels support an output with `columns` elements per row, computed from `x`."""
        vector = 16 // x.element_size()  # elements per 16-byte access; a block handles at most 2048 vectors of a row
        return native.runs(x) and columns % 16 == 0 and columns <= 2048 * vector and x.data_ptr() % 16 == 0

    @property
    def arguments(self) -> tuple[str, Tensor | None, Tensor | None]:
        """The last arguments of the fused operators."""
        return self.scaling, self.scale, self.amax

    def quantized(self, values: Tensor, scale_inv: Tensor) -> QuantizedTensor:
        """Wrap the output of a fused operator, which returns no `scale_inv` for TENSORWISE."""
        return QuantizedTensor(values, scale_inv if self.scale_inv is None else self.scale_inv, self.scaling)


@dataclass(frozen=True)
class AmaxOutput:
    """Output spec of an operator that takes the amax of its output while it writes it, before there is a scale.

    Attributes:
        amax: fp32 [1], zero before.
    """

    amax: Tensor


@dataclass(frozen=True)
class Fp8Activation:
    """An activation [t, h] that exists only in FP8.

    Attributes:
        quantized: the FP8 values, which matmuls read.
        carrier: tensor without memory, of the activation's shape and dtype, to which autograd attaches the gradient.
        transposed: the FP8 values transposed, [h, t], which weight gradients read, if they have been written.
    """

    quantized: QuantizedTensor
    carrier: Tensor
    transposed: QuantizedTensor | None = None


@dataclass(frozen=True)
class ActivationWithAmax:
    """An activation [t, h] in the model's dtype, and its amax, fp32 [1]."""

    values: Tensor
    amax: Tensor


@dataclass
class GradHandover:
    """How the op after a linear layer hands over the gradient of that layer's output, in one backward pass.

    Both get this object in their forward. In the backward, the op computes the gradient as `output` says, and the layer
    takes it: in FP8, row-major and transposed, while autograd carries a tensor without memory from one to the other, or
    with its amax. Results are those without a handover, bit for bit: the gradient is rounded to the model's dtype
    before it is quantized. The layer's output must have no other use, as the sum of two gradients was never quantized.

    Attributes:
        gradient: what the op's backward has returned to autograd, until the layer takes it.
        quantized: the gradient [t, out] in FP8 and its transpose.
    """

    output: Fp8Output | AmaxOutput
    gradient: Tensor | None = None
    quantized: tuple[QuantizedTensor, QuantizedTensor] | None = None

    def compute(
        self,
        plain: Callable[..., Tensor],
        fused: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
        arguments: tuple[Tensor, ...],
        shape: torch.Size,
    ) -> Tensor:
        """Compute a gradient of `shape` by one of two kernels: `plain` takes `arguments` and an amax, `fused` takes
        `arguments` and an FP8 output. Return the gradient, or what carries it.
        """
        if isinstance(self.output, AmaxOutput):
            self.gradient = plain(*arguments, self.output.amax)
        else:
            values, values_t, scale_inv, scale_inv_t = fused(*arguments, *self.output.arguments)
            self.quantized = self.output.quantized(values, scale_inv), self.output.quantized(values_t, scale_inv_t)
            self.gradient = carrier_of(arguments[0], shape)
        return self.gradient

    def take(self, gradient: Tensor) -> tuple[tuple[QuantizedTensor, QuantizedTensor] | None, Tensor | None]:
        """Return the FP8 values of the gradient that autograd carried to the layer, or its amax.

        Raises:
            RuntimeError: `gradient` is not what the op returned: the layer's output has another use.
        """
        handed_over, self.gradient = self.gradient, None
        quantized, self.quantized = self.quantized, None
        if handed_over is None or handed_over.data_ptr() != gradient.data_ptr():
            raise RuntimeError(
                "the gradient of a linear layer's output is not the one that the next op handed over: the output has "
                "another use, and its gradient cannot be quantized before the sum; give the layer no GradHandover"
            )
        return quantized, self.output.amax


def carrier_of(like: Tensor, shape: torch.Size) -> Tensor:
    """Create a tensor of `shape`, with the dtype and device of `like`, that takes no memory and has no values."""
    return like.new_empty(()).expand(shape)


def update_amax(amax: Tensor, x: Tensor) -> None:
    """Raise `amax`, fp32 [1], to max |x|, or to NaN if `x` has one; one read of memory on a GPU."""
    if native.runs(x):
        torch.ops.triaxis.amax_(amax, x)
    else:
        amax_reference(amax, x)


def amax_reference(amax: Tensor, x: Tensor) -> None:
    """Reference of `triaxis::amax_` in PyTorch."""
    if x.numel():
        torch.maximum(amax, x.abs().amax().view(1), out=amax)


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    *,
    row_major: bool = True,
    transposed: bool = False,
    scale: Tensor | None = None,
    scale_inv: Tensor | None = None,
    amax: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[QuantizedTensor | None, QuantizedTensor | None]:
    """Quantize `x` [m, k] to `dtype`: as [m, k] (`row_major`) and transposed to [k, m], each if requested.

    TENSORWISE multiplies x by `scale` and raises `amax` to at least max |x|; or, without a scale, takes it from `amax`,
    which then is max |x| (fp32 [1] each, as `scale_inv`, the reciprocal of the scale, if the caller has it). Scales per
    block are computed here; `power_of_two` rounds their `scale_inv` up to powers of two.

    Raises:
        ValueError: k (or m, for the transpose) is not a multiple of 16, which FP8 matmuls need.
    """
    rows, columns = x.shape
    if columns % 16 or (transposed and rows % 16):
        raise ValueError(f"[{rows}, {columns}] cannot be quantized: FP8 matmuls take multiples of 16")
    run = torch.ops.triaxis.quantize if native.runs(x) else quantize_reference
    values, values_t, *found = run(x, dtype, scaling, row_major, transposed, scale, amax, power_of_two)
    if scaling == TENSORWISE:
        if scale is not None:
            found[0] = scale.reciprocal() if scale_inv is None else scale_inv
        found[1] = found[0]
    return (
        QuantizedTensor(values, found[0], scaling) if row_major else None,
        QuantizedTensor(values_t, found[1], scaling) if transposed else None,
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
    requested. TENSORWISE: one `scale_inv` for both, the first, and none if there is a scale.
    """
    wide = x.float()
    no_values, no_scales = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
    if scaling == TENSORWISE:
        scale_inv = no_scales
        if scale is None:
            assert amax is not None
            scale = scale_from_amax(amax, dtype)
            scale_inv = scale.reciprocal()
        elif amax is not None:
            amax_reference(amax, wide)
        values = to_fp8(wide * scale, dtype)
        values_t = values.t().contiguous() if transposed else no_values
        return values if row_major else no_values, values_t, scale_inv, no_scales
    (values, scale_inv), (values_t, scale_inv_t) = (
        _quantize_blocks(matrix, dtype, scaling, power_of_two) if requested else (no_values, no_scales)
        for requested, matrix in ((row_major, wide), (transposed, wide.t()))
    )
    return values, values_t, scale_inv, scale_inv_t


def scale_from_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """max(dtype) / amax, fp32 of any shape: the factor before the cast to FP8, finite; 1 where `amax` is 0 or NaN."""
    largest = torch.full_like(amax, torch.finfo(dtype).max)
    return torch.where(amax > 0, largest / amax.clamp(min=MIN_AMAX), 1.0)


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest even, with saturation. PyTorch's conversion to E5M2 overflows to infinity."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def scale_inv_from_amax(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """Return the dequantization factor amax / max(dtype), which maps the largest FP8 value to `amax`.

    The same on every device: CUDA divides by a number as it multiplies by its reciprocal, so the divisor is a tensor;
    and its log2 of some powers of two is an ulp too large, so a billionth is taken off: fp32 numbers differ by more.
    """
    scale_inv = amax.clamp(min=MIN_AMAX) / torch.full_like(amax, torch.finfo(dtype).max)
    return torch.exp2(torch.ceil(torch.log2(scale_inv.double()) - 1e-9)).float() if power_of_two else scale_inv


def _quantize_blocks(x: Tensor, dtype: torch.dtype, scaling: Scaling, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantize `x` [m, k] with scales per block: values [m, k] and their `scale_inv`."""
    rows, columns = x.shape
    height = BLOCK_SIZE if scaling == BLOCK_128X128 else 1
    padded = F.pad(x, (0, -columns % BLOCK_SIZE, 0, -rows % height))
    blocks = padded.view(-1, height, padded.shape[1] // BLOCK_SIZE, BLOCK_SIZE)  # [block rows, height, …, 128]
    amax = blocks.abs().amax((1, 3)).clamp(min=MIN_AMAX)  # [block rows, block cols]
    scale_inv = scale_inv_from_amax(amax, dtype, power_of_two)
    scale = scale_inv.reciprocal() if power_of_two else torch.full_like(amax, torch.finfo(dtype).max).div_(amax)
    values = to_fp8(blocks * scale[:, None, :, None], dtype).view_as(padded)[:rows, :columns]
    if scaling == BLOCK_1X128:
        return values.contiguous(), scale_inv.t().contiguous()
    return values.contiguous(), F.pad(scale_inv, (0, -scale_inv.shape[1] % 4))

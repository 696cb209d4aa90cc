"""Floats to FP8 (E4M3, E5M2: Micikevicius et al., arXiv 2209.05433), with the scales that go with them.

A quantised matrix is the FP8 numbers and what to multiply them by: one number, one for each 1 × 128 elements of a row,
or one for each square of 128 × 128. Conversions saturate, everywhere; what is not a number stays so.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native

BLOCK = 128
_SMALLEST_AMAX = 1e-4  # a block of zeros still has a scale

Scaling = Literal["tensor", "rows", "squares"]


@dataclass(frozen=True)
class Quantised:
    """`values` FP8 [m, k]; `scales` fp32: "tensor" [1], "rows" [⌈k/128⌉, m], "squares" [⌈m/128⌉, ⌈k/128⌉ rounded up to
    a multiple of 4 with zeros]. values · scales is what was quantised."""

    values: Tensor
    scales: Tensor
    scaling: Scaling


@dataclass(frozen=True)
class Fp8Output:
    """How an operator quantises its output to E4M3 in the pass that makes it: as `quantize` would; see there."""

    scaling: Literal["tensor", "rows"]
    scale: Tensor | None = None
    amax: Tensor | None = None
    power_of_two: bool = False

    def possible(self, x: Tensor, columns: int) -> bool:
        """Whether the kernels can, for outputs of `columns` elements a row made from `x`."""
        vector = 16 // x.element_size()
        return native.runs(x) and columns % 16 == 0 and columns <= 2048 * vector and x.data_ptr() % 16 == 0

    @property
    def arguments(self) -> tuple[str, Tensor | None, Tensor | None, bool]:
        return self.scaling, self.scale, self.amax, self.power_of_two

    def quantised(self, values: Tensor, scales: Tensor) -> Quantised:
        """What such an operator returned."""
        return Quantised(values, scales if self.scale is None else self.scale.reciprocal(), self.scaling)


@dataclass(frozen=True)
class Fp8Activation:
    """An activation [t, h] that exists in FP8 alone.

    Attributes:
        quantised: what products read.
        carrier: a tensor of its shape, for autograd; it has no values.
    """

    quantised: Quantised
    carrier: Tensor


def carrier_of(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of a shape that takes no memory."""
    return like.new_zeros(()).expand(shape)


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    *,
    rowwise: bool = True,
    turned: bool = False,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Quantised | None, Quantised | None]:
    """`x` [m, k] as it lies, and transposed to [k, m], each where it is asked for.

    "tensor" needs `scale` (fp32, one element), which x is multiplied by, and raises `amax` (fp32, one element) to the
    largest magnitude of x. `power_of_two` rounds the scales of blocks up to powers of two.

    Raises:
        ValueError: k (or m, for the transposed) is not a multiple of 16, which FP8 products need.
    """
    rows, columns = x.shape
    if columns % 16 or (turned and rows % 16):
        raise ValueError(f"[{rows}, {columns}] cannot be quantised: FP8 products take multiples of 16")
    run = torch.ops.triaxis.quantize if native.runs(x) else quantize_reference
    values, turned_values, scales, turned_scales = run(x, dtype, scaling, rowwise, turned, scale, amax, power_of_two)
    if scaling == "tensor":
        assert scale is not None
        scales = turned_scales = scale.reciprocal()
    return (
        Quantised(values, scales, scaling) if rowwise else None,
        Quantised(turned_values, turned_scales, scaling) if turned else None,
    )


def quantize_reference(
    x: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    rowwise: bool,
    turned: bool,
    scale: Tensor | None,
    amax: Tensor | None,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel does, in plain PyTorch, for any device."""
    wide = x.float()
    if scaling == "tensor":
        assert scale is not None
        if amax is not None:
            torch.maximum(amax, wide.abs().amax().view_as(amax) if x.numel() else amax, out=amax)
        values = to_fp8(wide * scale, dtype)
        none = x.new_empty(0, dtype=torch.float32)
        return (
            values if rowwise else x.new_empty(0, dtype=dtype),
            values.t().contiguous() if turned else x.new_empty(0, dtype=dtype),
            none,
            none,
        )
    results = []
    for wanted, matrix in ((rowwise, wide), (turned, wide.t())):
        if wanted:
            results.append(_in_blocks(matrix, dtype, scaling, power_of_two))
        else:
            results.append((x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)))
    (values, scales), (turned_values, turned_scales) = results
    return values, turned_values, scales, turned_scales


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest even and saturated. Torch's own conversion lets E5M2 overflow to infinity."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """What FP8 numbers are to be multiplied by so that the largest stands for `amax`."""
    scale = amax.clamp(min=_SMALLEST_AMAX) / torch.finfo(dtype).max
    return torch.exp2(torch.ceil(torch.log2(scale.double()))).float() if power_of_two else scale


def _in_blocks(x: Tensor, dtype: torch.dtype, scaling: Scaling, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    height = BLOCK if scaling == "squares" else 1
    padded = F.pad(x, (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.view(-1, height, padded.shape[1] // BLOCK, BLOCK)  # [blocks down, height, blocks across, 128]
    amax = blocks.abs().amax((1, 3)).clamp(min=_SMALLEST_AMAX)  # [blocks down, blocks across]
    scales = scale_of(amax, dtype, power_of_two)
    factors = scales.reciprocal() if power_of_two else torch.full_like(amax, torch.finfo(dtype).max).div_(amax)
    values = to_fp8(blocks * factors[:, None, :, None], dtype).view_as(padded)[:rows, :columns]
    if scaling == "rows":
        return values.contiguous(), scales.t().contiguous()
    return values.contiguous(), F.pad(scales, (0, -scales.shape[1] % 4))

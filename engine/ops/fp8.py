"""Products of FP8 matrices with fp32 accumulation, and their emulation.

A product takes both factors with their rows along the summed dimension, as Hopper's FP8 instructions do. Without a GPU
the quantised factors are multiplied in fp32: every rounding of a real product but its accumulator's. What the GPU
would refuse is refused everywhere.
"""

from typing import Literal

import torch
from torch import Tensor

from engine.ops import native
from engine.ops.linear import matmul_transposed
from engine.ops.quantize import BLOCK, Quantised, quantize

MULTIPLE = 16  # of every size of an FP8 product
_PAIRS = {("tensor", "tensor"), ("rows", "squares"), ("squares", "rows"), ("rows", "rows")}


Implementation = Literal["auto", "cublaslt", "triaxis", "torch"]


def scaled_matmul(
    a: Quantised, b: Quantised, dtype: torch.dtype, *, fast: bool = False, by: Implementation = "auto"
) -> Tensor:
    """a·bᵀ for `a` [m, k] and `b` [n, k]: [m, n] of `dtype`.

    `fast` lets a GPU accumulate in fewer bits, which per-tensor scales alone admit.

    Raises:
        ValueError: sizes, formats or scalings that the GPU has no product for.
    """
    _require_supported(a, b)
    if a.values.is_cuda:
        return _on_gpu(a, b, dtype, None, fast, by)
    return matmul_transposed(dequantised(a), dequantised(b)).to(dtype)


def add_scaled_matmul(out: Tensor, a: Quantised, b: Quantised, *, by: Implementation = "auto") -> None:
    """Adds a·bᵀ to `out` fp32 [m, n]."""
    _require_supported(a, b)
    if a.values.is_cuda:
        _on_gpu(a, b, torch.float32, out, False, by)
    else:
        out.add_(matmul_transposed(dequantised(a), dequantised(b)))


def dequantised(x: Quantised) -> Tensor:
    """What the FP8 numbers stand for, fp32 [m, k]."""
    values = x.values.float()
    if x.scaling == "tensor":
        return values.mul_(x.scales)
    rows, columns = values.shape
    scales = x.scales.t() if x.scaling == "rows" else x.scales.repeat_interleave(BLOCK, 0)[:rows]
    return values.mul_(scales.repeat_interleave(BLOCK, 1)[:, :columns])


def turned(x: Quantised) -> Quantised:
    """The transpose, with its rows quantised: exact for one scale a tensor, quantised once more for blocks of rows."""
    if x.scaling == "tensor":
        return Quantised(x.values.t().contiguous(), x.scales, "tensor")
    wide = dequantised(x).to(torch.bfloat16)
    _, result = quantize(wide, x.values.dtype, x.scaling, rowwise=False, turned=True, power_of_two=True)
    assert result is not None
    return result


def _require_supported(a: Quantised, b: Quantised) -> None:
    for x in (a, b):
        if any(size % MULTIPLE for size in x.values.shape):
            raise ValueError(f"FP8 products take multiples of {MULTIPLE}, not {list(x.values.shape)}")
    if a.values.dtype == b.values.dtype == torch.float8_e5m2:
        raise ValueError("there is no FP8 product of two E5M2 matrices")
    if (a.scaling, b.scaling) not in _PAIRS:
        raise ValueError(f"there is no FP8 product of matrices scaled by {a.scaling} and by {b.scaling}")


def _on_gpu(
    a: Quantised, b: Quantised, dtype: torch.dtype, out: Tensor | None, fast: bool, by: Implementation
) -> Tensor:
    """The rule: cuBLASLt through csrc, which accumulates into `out`; without csrc PyTorch's call, which does not and
    which has one scale a tensor. The own kernel is for Hopper and scales of blocks, and has to be asked for by name."""
    if by == "auto":
        by = "torch" if native.WHY_NOT else "cublaslt"
    given = (a.values, b.values, a.scales, b.scales, a.scaling, b.scaling)
    if by == "torch":
        if a.scaling != "tensor":
            raise ValueError("PyTorch's FP8 product has one scale a tensor; scales of blocks need csrc")
        product = torch._scaled_mm(a.values, b.values.t(), a.scales, b.scales, out_dtype=dtype, use_fast_accum=fast)
        return product if out is None else out.add_(product)
    own = by == "triaxis" and a.scaling != "tensor"
    if out is None:
        if own:
            return torch.ops.triaxis.fp8_matmul_sm90(*given, dtype)
        return torch.ops.triaxis.fp8_matmul(*given, None, dtype, fast)
    add = torch.ops.triaxis.fp8_matmul_sm90_add_ if own else torch.ops.triaxis.fp8_matmul_add_
    add(out, *given)
    return out

"""FP8 matmuls with fp32 accumulation, and their emulation on a CPU.

Both operands are contiguous along the reduction dimension, as Hopper's FP8 instructions require. On a CPU, the operands
are dequantized and multiplied in fp32, which reproduces all roundings of the FP8 matmul but those of its accumulator.
Inputs that a GPU does not support are errors on a CPU, too.
"""

import torch
from torch import Tensor

from engine.config.schema import Fp8MatmulImpl
from engine.ops import native
from engine.ops.linear import add_or_copy, matmul_transposed
from engine.ops.quantize import (
    BLOCK_1X128,
    BLOCK_128X128,
    BLOCK_SIZE,
    TENSORWISE,
    QuantizedTensor,
    Scaling,
    quantize_reference,
)

_SIZE_MULTIPLE = 16  # m, n and k must be multiples of it
_SCALINGS = {
    (TENSORWISE, TENSORWISE),
    (BLOCK_1X128, BLOCK_128X128),
    (BLOCK_128X128, BLOCK_1X128),
    (BLOCK_1X128, BLOCK_1X128),
}


def scaled_matmul(
    a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype, *, fast: bool = False, impl: Fp8MatmulImpl = "auto"
) -> Tensor:
    """a·bᵀ for `a` [m, k] and `b` [n, k]: [m, n] of `dtype`.

    `fast` lets a GPU accumulate in fewer bits; only TENSORWISE matmuls support it.

    Raises:
        ValueError: no GPU supports a matmul of these sizes, formats or scalings.
    """
    _require_supported(a, b)
    if a.values.device.type != "cpu":
        return _on_gpu(a, b, dtype, None, fast, impl)
    return matmul_transposed(dequantize(a), dequantize(b)).to(dtype)


def add_scaled_matmul(
    out: Tensor, a: QuantizedTensor, b: QuantizedTensor, *, accumulate: bool = True, impl: Fp8MatmulImpl = "auto"
) -> None:
    """Add a·bᵀ to `out` fp32 [m, n], or overwrite it unless `accumulate`.

    Raises:
        ValueError: as `scaled_matmul`.
    """
    _require_supported(a, b)
    if a.values.device.type != "cpu":
        _on_gpu(a, b, torch.float32, out, False, impl, accumulate)
    else:
        add_or_copy(out, matmul_transposed(dequantize(a), dequantize(b)), accumulate)


def dequantize(x: QuantizedTensor) -> Tensor:
    """Return values · scale_inv, fp32 [m, k]."""
    values = x.values.float()
    if x.scaling == TENSORWISE:
        return values.mul_(x.scale_inv)
    rows, columns = values.shape
    by_row = x.scale_inv.t() if x.scaling == BLOCK_1X128 else x.scale_inv.repeat_interleave(BLOCK_SIZE, 0)[:rows]
    return values.mul_(by_row.repeat_interleave(BLOCK_SIZE, 1)[:, :columns])


def transpose(x: QuantizedTensor) -> QuantizedTensor:
    """Transpose. Exact for TENSORWISE; BLOCK_1X128 is quantized again, by powers of two along the other dimension: if
    the scales of `x` are powers of two, only values that become subnormal are rounded.

    Raises:
        ValueError: `x` is BLOCK_128X128, which `quantize` transposes.
    """
    if x.scaling == BLOCK_128X128:
        raise ValueError("a matrix scaled block_128x128 is not transposed: quantize it with transposed=True")
    run = torch.ops.triaxis.transpose_fp8 if native.runs(x.scale_inv) else transpose_reference
    values, scale_inv = run(x.values, x.scale_inv, x.scaling)
    return QuantizedTensor(values, x.scale_inv if x.scaling == TENSORWISE else scale_inv, x.scaling)


def transpose_reference(values: Tensor, scale_inv: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Reference of `triaxis::transpose_fp8` in PyTorch: the transpose and its `scale_inv`, empty for TENSORWISE."""
    if scaling == TENSORWISE:
        return values.t().contiguous(), scale_inv.new_empty(0)
    wide = dequantize(QuantizedTensor(values, scale_inv, scaling))
    _, values_t, _, scale_inv_t = quantize_reference(wide, values.dtype, scaling, False, True, None, None, True)
    return values_t, scale_inv_t


def _require_supported(a: QuantizedTensor, b: QuantizedTensor) -> None:
    for x in (a, b):
        if any(size % _SIZE_MULTIPLE for size in x.values.shape):
            raise ValueError(f"FP8 matmuls take multiples of {_SIZE_MULTIPLE}, not {list(x.values.shape)}")
    if a.values.dtype == b.values.dtype == torch.float8_e5m2:
        raise ValueError("no FP8 matmul supports two E5M2 matrices")
    if (a.scaling, b.scaling) not in _SCALINGS:
        raise ValueError(f"no FP8 matmul supports matrices scaled {a.scaling} and {b.scaling}")


def _on_gpu(
    a: QuantizedTensor,
    b: QuantizedTensor,
    dtype: torch.dtype,
    out: Tensor | None,
    fast: bool,
    impl: Fp8MatmulImpl,
    accumulate: bool = True,
) -> Tensor:
    """Resolve `auto` and run: cuBLASLt through csrc, which accumulates into `out`; without csrc PyTorch's matmul, which
    is TENSORWISE and does not accumulate. The custom kernel (Hopper, scales per block) must be requested by name, which
    a run on a GPU refuses until it is proven (`require_fp8`).
    """
    if impl == "auto":
        impl = "torch" if native.WHY_NOT else "cublaslt"
    operands = (a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling)
    if impl == "torch":
        if a.scaling != TENSORWISE:
            raise ValueError("PyTorch's FP8 matmul has one scale per tensor; scales per block need csrc")
        scales = {"scale_a": a.scale_inv, "scale_b": b.scale_inv}
        result = torch._scaled_mm(a.values, b.values.t(), **scales, out_dtype=dtype, use_fast_accum=fast)
        if out is None:
            return result
        add_or_copy(out, result, accumulate)
        return out
    sm90 = impl == "triaxis" and a.scaling != TENSORWISE
    if out is None:
        if sm90:
            return torch.ops.triaxis.fp8_matmul_sm90(*operands, dtype)
        return torch.ops.triaxis.fp8_matmul(*operands, dtype, fast)
    if sm90:
        torch.ops.triaxis.fp8_matmul_sm90_add_(out if accumulate else out.zero_(), *operands)
    else:
        torch.ops.triaxis.fp8_matmul_add_(out, *operands, accumulate)
    return out

"""csrc/kernels/quantize.cu on a GPU."""

import pytest
import torch

from engine.ops.fp8 import dequantize
from engine.ops.quantize import QuantizedTensor, quantize_reference, scale_from_amax
from tests.csrc.test_quantize import (  # noqa: F401
    FP8,
    bits,
    test_a_scale_from_the_amax,
    test_as_the_reference,
    test_flat_parts_of_a_weight_have_the_values_of_the_whole,
    test_fused_norms_equal_norm_then_quantize,
    test_fused_swiglu_equals_swiglu_then_quantize,
    test_nan_stays_nan,
    test_norms_and_swiglu_take_the_amax_of_what_they_write,
    test_rounds_to_nearest_even_and_saturates,
    test_the_amax_of_a_given_scale_keeps_nan,
    test_the_amax_of_a_part_of_each_row,
    test_the_amax_of_a_tensor,
    test_wrong_arguments_are_named,
    test_zeros_have_a_scale,
)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128", "block_128x128"])
def test_at_the_size_of_a_7b(emulated, scaling, dtype):
    """What the numbers stand for: the scales are equal, and one number in a thousand may be off by one code."""
    torch.manual_seed(0)
    x = torch.randn(8192, 4096, dtype=torch.bfloat16)
    scale = torch.tensor([3.7]) if scaling == "tensorwise" else None
    arguments = (x, dtype, scaling, True, True, scale, None, scaling != "tensorwise")
    got, expected = torch.ops.triaxis.quantize(*arguments), quantize_reference(*arguments)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert torch.equal(a, b)
    for i in range(2):  # row-major, transposed
        scale_inv = [x[2 + i] if scale is None else scale.reciprocal() for x in (got, expected)]
        a, b = (
            dequantize(QuantizedTensor(x[i], inv, scaling)) for x, inv in zip((got, expected), scale_inv, strict=True)
        )
        differ = a != b
        assert differ.float().mean() <= 1e-3
        # a code further: at most an eighth (E4M3) or a quarter (E5M2), or the smallest number that is not 0
        smallest = dequantize(QuantizedTensor(torch.ones_like(bits(got[i])).view(dtype), scale_inv[0], scaling))
        code = b.abs() * (1 / 8 if dtype == torch.float8_e4m3fn else 1 / 4)
        assert ((a - b).abs() <= torch.maximum(code, smallest) * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_amax_of_a_large_tensor(emulated, dtype):
    """Wherever its largest element is: at the ends, and where 32 bits no longer count the bytes."""
    x = torch.zeros(2**31 + 13 if dtype == torch.bfloat16 else 2**29 + 13, dtype=dtype)
    for number, at in enumerate((0, 2**28 + 5, 2**29 + 3, len(x) - 14, len(x) - 1)):
        x[at] = -1.0 - number
        torch.ops.triaxis.amax_(amax := torch.zeros(1), x)
        assert amax.item() == 1.0 + number


def test_quantizing_by_the_amax_at_the_size_of_a_7b(emulated):
    """Bitwise the same as by the scale that PyTorch computes, and the maxima that kernels take are PyTorch's."""
    torch.manual_seed(0)
    ops, (x, weight) = torch.ops.triaxis, (torch.randn(*size, dtype=torch.bfloat16) for size in ((8192, 4096), (4096,)))
    y = ops.norm_forward(x, None, weight, None, 1e-5, False, amax := torch.zeros(1))[0]
    ops.amax_(read := torch.zeros(1), y)
    expected = y.abs().amax().float().view(1)
    assert torch.equal(amax, expected)
    assert torch.equal(read, expected)
    for dtype in FP8:
        scale = scale_from_amax(expected, dtype)
        *values, _, _ = ops.quantize(y, dtype, "tensorwise", True, True, scale, None, False)
        *got, scale_inv, _ = ops.quantize(y, dtype, "tensorwise", True, True, None, amax, False)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, values, strict=True))
        assert torch.equal(scale_inv, scale.reciprocal())

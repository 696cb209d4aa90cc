"""csrc/kernels/quantize.cu on a GPU."""

import pytest
import torch

from engine.ops.fp8 import dequantize
from engine.ops.quantize import QuantizedTensor, quantize_reference
from tests.csrc.test_quantize import (  # noqa: F401
    FP8,
    bits,
    test_as_the_reference,
    test_flat_parts_of_a_weight_have_the_values_of_the_whole,
    test_fused_norms_equal_norm_then_quantize,
    test_fused_swiglu_equals_swiglu_then_quantize,
    test_nan_stays_nan,
    test_rounds_to_nearest_even_and_saturates,
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

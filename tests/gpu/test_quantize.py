"""csrc/kernels/quantize.cu on a GPU."""

import pytest
import torch

from engine.ops.quantize import quantize_reference
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
    """One byte in a thousand may be off by one code, because the two divide differently."""
    torch.manual_seed(0)
    x = torch.randn(8192, 4096, dtype=torch.bfloat16)
    scale = torch.tensor([3.7]) if scaling == "tensorwise" else None
    arguments = (x, dtype, scaling, True, True, scale, None, scaling != "tensorwise")
    got, expected = torch.ops.triaxis.quantize(*arguments), quantize_reference(*arguments)
    for a, b in zip(got[:2], expected[:2], strict=True):
        distance = (bits(a).int() - bits(b).int()).abs()
        assert distance.max() <= 1
        assert (distance > 0).float().mean() <= 1e-3
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert torch.equal(a, b)

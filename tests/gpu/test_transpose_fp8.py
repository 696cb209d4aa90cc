"""Transposing FP8 (csrc/kernels/quantize.cu) on a GPU."""

import pytest
import torch

from engine.ops.fp8 import transpose_reference
from tests.csrc.test_transpose_fp8 import (  # noqa: F401
    FP8,
    bits,
    rows_of,
    test_blocks_are_those_of_the_dequantized_matrix,
    test_nan_stays_nan_and_spoils_no_other,
    test_nothing,
    test_one_scale_moves_every_byte,
    test_only_numbers_that_become_subnormal_are_rounded,
    test_part_of_a_larger_tensor,
    test_scales_that_are_no_powers_of_two,
    test_wrong_arguments_are_named,
)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
@pytest.mark.parametrize("columns", [4096, 11008])
def test_at_the_size_of_a_7b(emulated, columns, scaling, dtype):
    torch.manual_seed(0)
    values, scale_inv = rows_of(8192, columns, dtype)
    got, expected = (run(values, scale_inv, scaling) for run in (torch.ops.triaxis.transpose_fp8, transpose_reference))
    assert torch.equal(bits(got[0]), bits(expected[0]))
    assert torch.equal(got[1], expected[1])

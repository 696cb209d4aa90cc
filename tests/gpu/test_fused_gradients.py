"""Backward passes of csrc that write FP8 or take the amax, on a GPU."""

import pytest
import torch

from tests.csrc.test_fused_gradients import (  # noqa: F401
    assert_as_quantized,
    gate_up_and_grad,
    heads_and_tables,
    test_an_amax_shows_what_is_no_number,
    test_rope,
    test_rope_of_hostile_values,
    test_rope_takes_the_amax,
    test_swiglu,
    test_swiglu_of_hostile_values,
    test_swiglu_takes_the_amax,
    test_wrong_arguments_are_named,
)

ops = torch.ops.triaxis


@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
def test_at_the_size_of_a_7b(emulated, scaling):
    """Bit for bit what the gradient and `quantize` give, in two kernels."""
    torch.manual_seed(0)
    arguments = gate_up_and_grad(8192, 11008, torch.bfloat16)
    assert_as_quantized(ops.swiglu_backward_fp8, ops.swiglu_backward, arguments, scaling)
    arguments = heads_and_tables(8192, 32, 8, 128, torch.bfloat16)
    assert_as_quantized(ops.rope_qk_backward_fp8, ops.rope_qk_backward, arguments, scaling)

"""csrc/kernels/norm.cu on a GPU."""

import pytest
import torch

from tests.csrc.test_norm import (  # noqa: F401
    GENERAL,
    TUNED,
    check,
    test_not_a_number_stays_in_its_row,
    test_not_a_number_stays_in_its_row_of_the_gradient,
    test_options,
    test_rows,
    test_sizes,
    test_the_same_numbers_every_time,
    test_wrong_arguments_are_named,
)


@pytest.mark.parametrize("columns", TUNED + GENERAL)
@pytest.mark.parametrize("centered", [False, True])
def test_more_rows_than_blocks(emulated, columns, centered):
    torch.manual_seed(columns)
    check(1 + 2**22 // max(columns, 1024), columns, torch.bfloat16, centered=centered, residual=True, bias=centered)


def test_at_the_size_of_a_7b(emulated):
    torch.manual_seed(0)
    for options in ({"residual": True}, {"centered": True, "bias": True}, {"gap": 64}):
        check(8192, 4096, torch.bfloat16, **{"centered": False, **options})


@pytest.mark.parametrize("centered", [False, True])
def test_repeats_bitwise_at_the_size_of_a_7b(emulated, centered):
    torch.manual_seed(0)
    ops = torch.ops.triaxis
    x, grad = (torch.randn(8192, 4096, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(4096, dtype=torch.bfloat16)
    results = []
    for _ in range(4):
        y, _, mean, rstd = ops.norm_forward(x, None, weight, None, 1e-5, centered)
        gradients = ops.norm_backward(grad, None, x, weight, mean, rstd, centered)
        results.append((y, mean, rstd, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

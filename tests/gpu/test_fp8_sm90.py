"""csrc/gemm/fp8_sm90.cu on a GPU, whose tensor cores sum 128 products in fewer bits than the host."""

import pytest
import torch

from tests.csrc.test_fp8_sm90 import (  # noqa: F401
    SHAPES,
    error,
    expected,
    given,
    operand,
    test_not_a_number_stays_in_its_row,
    test_of_nothing,
    test_wrong_arguments_are_named,
)
from tools.bench import fp8_accumulate

ops = torch.ops.triaxis
ACCURATE = 2e-3  # relative L2
RUNS = 100

if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("a kernel for compute capability 9.0 alone", allow_module_level=True)


@pytest.mark.parametrize("m, n, k", [*SHAPES, (8192, 12288, 4096), (4096, 11008, 8192)])
@pytest.mark.parametrize("scaling", ["block_1x128", "block_128x128"])
def test_matmul(emulated, m, n, k, scaling):
    torch.manual_seed(m + n + k)
    a, b = operand(m, k, "block_1x128"), operand(n, k, scaling)
    exact = expected(a, b)
    for dtype, most in ((torch.float32, ACCURATE), (torch.bfloat16, ACCURATE + 1e-3)):
        got = ops.fp8_matmul_sm90(*given(a, b), dtype)
        assert error(got, exact) < most
        # an error in a row of small values counts as well
        by_row = (got.float() - exact).norm(dim=1) / exact.norm(dim=1)
        assert by_row.max() < 4 * most


@pytest.mark.parametrize("m, n, k", [(208, 144, 144), (12288, 4096, 8192)])
@pytest.mark.parametrize("scaling", ["block_1x128", "block_128x128"])
def test_adds_to_what_is_there(emulated, m, n, k, scaling):
    """Twice the same matmul is twice its result, bit for bit; a sum with other values is rounded."""
    torch.manual_seed(0)
    a, b = operand(m, k, "block_1x128"), operand(n, k, scaling)
    exact = expected(a, b)
    around = torch.randn(m + 2, n) * exact.std()
    before = around.clone()
    ops.fp8_matmul_sm90_add_(around[1:-1], *given(a, b))
    assert error(around[1:-1] - before[1:-1], exact) < ACCURATE
    assert torch.equal(around[[0, -1]], before[[0, -1]])  # nothing beyond the edges
    once = ops.fp8_matmul_sm90(*given(a, b), torch.float32)
    twice = once.clone()
    ops.fp8_matmul_sm90_add_(twice, *given(a, b))
    assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize("scaling", ["block_1x128", "block_128x128"])
def test_zeros_plus_matmul_is_the_matmul_bitwise(emulated, scaling):
    """100 times, because a fault in the order of memory shows now and then; the message says where errors lie."""
    torch.manual_seed(0)
    operands = fp8_accumulate.operand(12288, 8192, "block_1x128"), fp8_accumulate.operand(4096, 8192, scaling)
    unequal, found = fp8_accumulate.compare(*operands, RUNS)
    assert unequal == 0
    assert found.runs == 0, "\n".join(found.lines(RUNS))


def test_repeats_bitwise(emulated):
    torch.manual_seed(0)
    a, b = operand(2048, 4096, "block_1x128"), operand(2048, 4096, "block_128x128")
    first, *others = (ops.fp8_matmul_sm90(*given(a, b), torch.bfloat16) for _ in range(20))
    assert all(torch.equal(first, other) for other in others)

import pytest
import torch

from engine.ops.linear import linear, linear_reference, matmul_transposed, uses_onednn
from tests.ops.op_parity import BF16, assert_same, strided

LARGE = [(130, 257, 129), (2048, 64, 192), (64, 192, 1024), (17, 512, 256)]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LARGE)
def test_onednn_equals_pytorch(rows, inputs, outputs):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    assert uses_onednn(x, weight)
    # sums of up to 2048 products of unit variance, added in another order
    assert_same(linear, linear_reference, [x, weight, bias], torch.randn(rows, outputs), rtol=1e-5, atol=2e-4)
    assert_same(linear, linear_reference, [x, weight], strided(rows, outputs), rtol=1e-5, atol=2e-4)


def test_more_dimensions_than_two():
    torch.manual_seed(0)
    inputs = [torch.randn(5, 26, 257), torch.randn(129, 257), torch.randn(129)]
    assert_same(linear, linear_reference, inputs, torch.randn(5, 26, 129), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("rows", [0, 1, 15])
def test_small_products_stay_with_pytorch(rows):
    inputs = [torch.randn(rows, 512), torch.randn(2048, 512), torch.randn(2048)]
    assert not uses_onednn(*inputs[:2])
    assert_same(linear, linear_reference, inputs, rtol=0, atol=0)


def test_other_dtypes_stay_with_pytorch():
    inputs = [torch.randn(130, 257), torch.randn(129, 257) / 16]
    assert not uses_onednn(*(x.double() for x in inputs))
    assert not uses_onednn(*(x.bfloat16() for x in inputs))
    assert not uses_onednn(*(x.to("meta") for x in inputs))
    assert_same(linear, linear_reference, [x.bfloat16() for x in inputs], rtol=2e-2, atol=BF16["atol"])


@pytest.mark.parametrize("view", ["plain", "transposed", "rows with gaps", "columns with gaps"])
def test_operands_of_any_layout(view):
    torch.manual_seed(0)

    def operand(rows: int, columns: int) -> torch.Tensor:
        return {
            "plain": torch.randn(rows, columns),
            "transposed": torch.randn(columns, rows).t(),
            "rows with gaps": strided(rows, columns),
            "columns with gaps": strided(columns, rows).t(),
        }[view]

    a, b = operand(130, 257), operand(129, 257)
    expected = (a.double() @ b.double().t()).float()
    torch.testing.assert_close(matmul_transposed(a, b), expected, rtol=1e-5, atol=1e-4)


def test_only_the_wanted_gradients_are_computed():
    x, weight = torch.randn(130, 257), torch.randn(129, 257, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None

import pytest
import torch

from engine.ops.linear import add_grad_weight, grad_weight, linear, linear_reference, matmul_transposed, uses_onednn
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
def test_small_matmuls_stay_with_pytorch(rows):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(130, 257, 129), (130, 129, 257), (1, 5, 3), (0, 5, 3)])
def test_weight_gradients_add_up(dtype, tokens, outputs, inputs):
    torch.manual_seed(0)
    grads, xs = (torch.randn(2, tokens, size).to(dtype) for size in (outputs, inputs))
    out = before = torch.full((outputs, inputs), 7.0)
    for grad, x in zip(grads, xs, strict=True):
        add_grad_weight(out, grad, x)
    assert out is before
    assert out.dtype == torch.float32
    expected = 7 + torch.einsum("cto,cti->oi", grads.double(), xs.double()).float()
    # a bf16 matmul is rounded once before it is added
    tolerance = {"rtol": 1e-5, "atol": 2e-4} if dtype == torch.float32 else {"rtol": BF16["rtol"], "atol": 0.3}
    torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 3), (3, 5), (257, 129), (129, 257)])
def test_the_weight_gradient_is_that_of_autograd(outputs, inputs):
    torch.manual_seed(0)
    x, weight = torch.randn(130, inputs), torch.randn(outputs, inputs, requires_grad=True)
    grad = torch.randn(130, outputs)
    linear_reference(x, weight).backward(grad)
    torch.testing.assert_close(grad_weight(grad, x), weight.grad, rtol=1e-5, atol=2e-4)

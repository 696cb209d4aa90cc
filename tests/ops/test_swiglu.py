import pytest
import torch

from engine.ops.swiglu import geglu, geglu_reference, swiglu, swiglu_reference
from tests.ops.op_parity import BF16, FP32, assert_same, strided


@pytest.mark.parametrize("shape", [(1, 2), (7, 34), (64, 1376), (0, 8), (2, 3, 10)])
@pytest.mark.parametrize(("op", "reference"), [(swiglu, swiglu_reference), (geglu, geglu_reference)])
def test_equals_its_reference(shape, op, reference):
    torch.manual_seed(0)
    grad = strided(*shape[:-1], shape[-1] // 2)
    assert_same(op, reference, [torch.randn(shape)], grad, **FP32)
    x = strided(*shape)
    torch.testing.assert_close(op(x), reference(x), rtol=5e-6, atol=0)


def test_gate_comes_first():
    torch.testing.assert_close(swiglu(torch.tensor([[0.0, 1.0, 5.0, 7.0]])), torch.tensor([[0.0, 7 * 0.7310586]]))
    torch.testing.assert_close(geglu(torch.tensor([[0.0, 1.0, 5.0, 7.0]])), torch.tensor([[0.0, 7 * 0.8411920]]))


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_gradients_in_double(op):
    assert torch.autograd.gradcheck(op, (torch.randn(3, 8).double().requires_grad_(),))


def test_bf16():
    torch.manual_seed(0)
    x = torch.randn(64, 96).bfloat16()
    assert swiglu(x).dtype == torch.bfloat16
    assert_same(swiglu, swiglu_reference, [x], torch.randn(64, 48).bfloat16(), **BF16 | {"rtol": 2e-2})


def test_never_waits_for_the_device():
    x = torch.randn(4, 8, device="meta", requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad is not None

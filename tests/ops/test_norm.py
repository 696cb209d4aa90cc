import pytest
import torch
import torch.nn.functional as F

from engine.ops.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference, sharded_rms_norm
from tests.ops.op_parity import FP32, assert_same, strided

SHAPES = [(1, 1), (7, 33), (64, 256), (0, 16), (3, 5, 8)]


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-5)


def rms_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm_reference(x, weight, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_its_reference(shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(shape[-1])]
    torch.testing.assert_close(rms(*inputs), rms_reference(*inputs), rtol=5e-6, atol=1e-6)
    assert_same(rms, rms_reference, inputs, torch.randn(shape), **FP32)
    assert_same(rms, rms_reference, inputs, strided(*shape), **FP32)


def test_rms_norm_equals_pytorch():
    x, weight = torch.randn(7, 33), torch.randn(33)
    torch.testing.assert_close(rms(x, weight), F.rms_norm(x, (33,), weight, 1e-5), rtol=5e-6, atol=1e-6)


def test_rms_norm_gradients_in_double():
    inputs = (torch.randn(4, 7).double().requires_grad_(), torch.randn(7).double().requires_grad_())
    assert torch.autograd.gradcheck(rms, inputs)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [rms, lambda x, weight: layer_norm(x, weight, torch.zeros_like(weight), 1e-5)])
def test_bf16_is_rounded_once(norm, weight_dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).to(weight_dtype)
    got, exact = norm(x, weight), norm(x.float(), weight.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact.bfloat16().float(), rtol=1e-2, atol=1e-5)


def test_bf16_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()]
    assert_same(rms, rms_reference, inputs, torch.randn(64, 256).bfloat16(), rtol=1e-2, atol=1e-2)


def test_statistics_of_fp16_do_not_overflow():
    x = torch.full((2, 256), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(rms(x, torch.ones(256, dtype=torch.float16)), torch.ones_like(x))


def test_eps_is_inside_the_root():
    x = torch.full((1, 4), 3e-3)
    expected = x / (x.square().mean() + 1e-5).sqrt()
    torch.testing.assert_close(rms(x, torch.ones(4)), expected)
    assert torch.equal(rms(torch.zeros(1, 4), torch.ones(4)), torch.zeros(1, 4))


@pytest.mark.parametrize("shape", SHAPES[1:])  # the variance of one number is 0, and its noise is 1/sqrt(eps)
def test_layer_norm_equals_its_reference(shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])]
    assert_same(
        lambda *args: layer_norm(*args, 1e-5),
        lambda *args: layer_norm_reference(*args, 1e-5),
        inputs,
        strided(*shape),
        **FP32,
    )


def test_a_norm_of_sharded_features_equals_that_of_all():
    """Two ranks with 8 and 4 of 12 features; each adds the other's sums."""
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(*shape).double() for shape in ((5, 12), (12,), (5, 12)))
    whole = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = rms_reference(*whole)
    expected.backward(grad)
    product = grad * weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    for part, rest in ((slice(0, 8), slice(8, 12)), (slice(8, 12), slice(0, 8))):
        others = iter([x[:, rest].square().sum(-1, keepdim=True), product[:, rest].sum(-1, keepdim=True)])
        own = [x[:, part].clone().requires_grad_(), weight[part].clone().requires_grad_()]
        out = sharded_rms_norm(*own, 1e-5, lambda sums, others=others: (sums + next(others)) / 12)
        out.backward(grad[:, part])
        torch.testing.assert_close(out, expected[:, part])
        torch.testing.assert_close(own[0].grad, whole[0].grad[:, part])
        torch.testing.assert_close(own[1].grad, whole[1].grad[part])


def test_nan_stays_nan():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    out = rms(x, torch.ones(8))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_never_waits_for_the_device():
    x, weight = torch.randn(8, 16, device="meta"), torch.randn(16, device="meta")
    assert rms(x, weight).shape == layer_norm(x, weight, weight, 1e-5).shape == (8, 16)

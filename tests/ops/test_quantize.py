import pytest
import torch

from engine.ops.fp8 import add_scaled_matmul, dequantize, scaled_matmul, transpose
from engine.ops.quantize import quantize, scale_from_amax, scale_inv_from_amax, to_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def one(x, dtype, scaling, **options):
    if scaling == "tensorwise":
        options["scale"] = scale_inv_from_amax(x.abs().max().view(1), dtype).reciprocal()
    result, _ = quantize(x, dtype, scaling, **options)
    return result


@pytest.mark.parametrize("dtype, error", [(E4M3, 2**-4), (E5M2, 2**-3)])
@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128", "block_128x128"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_dequantize_inverts_quantize(dtype, error, scaling, power_of_two):
    """Within half a unit in the last place, for values that do not underflow."""
    torch.manual_seed(0)
    x = torch.randn(48, 272)
    got = dequantize(one(x, dtype, scaling, power_of_two=power_of_two))
    large = x.abs() > 0.05
    assert ((got - x).abs() <= error * x.abs() * 1.001)[large].all()


def test_blocks_of_very_different_sizes():
    """The accuracy of a block does not depend on the other blocks."""
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    x[:128, :128] *= 1e6
    for scaling in ("block_1x128", "block_128x128"):
        got = dequantize(one(x, E4M3, scaling))
        small = torch.zeros_like(x, dtype=torch.bool)
        small[128:, 128:] = True
        assert (got - x)[small].norm() < 0.04 * x[small].norm()
    coarse = dequantize(one(x, E4M3, "tensorwise"))
    assert (coarse - x)[small].norm() > 0.3 * x[small].norm()


def test_scales_are_those_of_every_device(monkeypatch):
    """With CUDA's arithmetic: a quotient by a number is a product with its reciprocal, and log2 of 2^n may exceed n."""
    amax = torch.cat((torch.rand(20_000) + 1e-3, 448 * torch.exp2(torch.arange(-20.0, 20))))
    cases = [(dtype, power_of_two) for dtype in (E4M3, E5M2) for power_of_two in (False, True)]
    expected = [scale_inv_from_amax(amax, *case) for case in cases]
    assert torch.equal(expected[1][20_000:], torch.exp2(torch.arange(-20.0, 20)).clamp(min=2.0**-22))
    divide, log2 = torch.Tensor.__truediv__, torch.log2

    def by_reciprocal(x, y):
        return divide(x, y) if isinstance(y, torch.Tensor) else x * (1 / y)

    monkeypatch.setattr(torch.Tensor, "__truediv__", by_reciprocal)
    monkeypatch.setattr(torch, "log2", lambda x: log2(x).nextafter(torch.tensor(torch.inf).double()))
    for case, scales in zip(cases, expected, strict=True):
        assert torch.equal(scale_inv_from_amax(amax, *case), scales), case


def test_both_ways_are_one_matrix():
    x = torch.randn(32, 48)
    for scaling in ("tensorwise", "block_128x128"):
        options = {"scale": torch.ones(1)} if scaling == "tensorwise" else {}
        straight, across = quantize(x, E4M3, scaling, transposed=True, **options)
        assert torch.equal(dequantize(straight).t(), dequantize(across))


def test_amax_is_raised_and_never_lowered():
    amax = torch.tensor([2.0])
    quantize(torch.full((16, 16), -1.5), E4M3, "tensorwise", scale=torch.ones(1), amax=amax)
    assert amax.item() == 2.0
    quantize(torch.full((16, 16), -3.5), E4M3, "tensorwise", scale=torch.ones(1), amax=amax)
    assert amax.item() == 3.5


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_conversion_saturates(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([1e9, -1e9, largest, torch.inf, torch.nan])
    assert to_fp8(x, dtype).float()[:4].tolist() == [largest, -largest, largest, largest]
    assert to_fp8(x, dtype).float()[4].isnan()


@pytest.mark.parametrize(
    "scalings",
    [
        ("tensorwise", "tensorwise"),
        ("block_1x128", "block_128x128"),
        ("block_1x128", "block_1x128"),
        ("block_128x128", "block_1x128"),
    ],
)
def test_matmuls_equal_those_of_the_dequantized(scalings):
    torch.manual_seed(0)
    a = one(torch.randn(32, 272), E4M3, scalings[0])
    b = one(torch.randn(144, 272), E5M2, scalings[1])
    exact = dequantize(a).double() @ dequantize(b).double().t()
    torch.testing.assert_close(scaled_matmul(a, b, torch.float32).double(), exact, rtol=1e-5, atol=1e-4)
    assert scaled_matmul(a, b, torch.bfloat16).dtype == torch.bfloat16
    total = torch.ones(32, 144)
    add_scaled_matmul(total, a, b)
    torch.testing.assert_close(total.double(), exact + 1, rtol=1e-5, atol=1e-4)


def test_transpose_is_exact_for_one_scale_and_close_for_blocks():
    torch.manual_seed(0)
    x = torch.randn(256, 144)
    whole = one(x, E4M3, "tensorwise")
    assert torch.equal(dequantize(transpose(whole)), dequantize(whole).t())
    rows = one(x, E4M3, "block_1x128", power_of_two=True)
    again = dequantize(transpose(rows))
    assert (again - dequantize(rows).t()).norm() < 1e-3 * x.norm()  # only the smallest are rounded once more


def test_transposed_blocks_are_those_that_bf16_gave():
    """Dequantized by powers of two, FP8 numbers are exact in bf16."""
    torch.manual_seed(0)
    rows = one(torch.randn(144, 272) * torch.logspace(-3, 3, 272), E4M3, "block_1x128", power_of_two=True)
    got = transpose(rows)
    wide = dequantize(rows).bfloat16()
    _, expected = quantize(wide, E4M3, "block_1x128", row_major=False, transposed=True, power_of_two=True)
    assert torch.equal(got.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(got.scale_inv, expected.scale_inv)


@pytest.mark.parametrize("scaling", ["block_1x128", "block_128x128"])
def test_small_gradients_keep_their_bits(scaling):
    """The loss of a step with millions of tokens is divided by their number."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    usual, small = (one(x * 2.0**exponent, E4M3, scaling, power_of_two=True) for exponent in (0, -60))
    assert torch.equal(small.values.view(torch.uint8), usual.values.view(torch.uint8))
    assert torch.equal(small.scale_inv, usual.scale_inv * 2.0**-60)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_zeros_beside_the_smallest_numbers_stay_zeros(dtype):
    amax = torch.tensor([1e-45, 1e-38, 1e-34, 1e-30])
    assert ((scale := scale_from_amax(amax, dtype)) * 0 == 0).all()
    assert (scale.reciprocal() > 0).all()


def test_squares_are_not_transposed():
    with pytest.raises(ValueError, match="quantize it with transposed=True"):
        transpose(one(torch.randn(32, 32), E4M3, "block_128x128"))


def test_what_a_gpu_refuses_is_refused():
    x = torch.randn(32, 32)
    with pytest.raises(ValueError, match=r"\[32, 24\] cannot be quantized: FP8 matmuls take multiples of 16"):
        quantize(x[:, :24], E4M3, "block_1x128")
    with pytest.raises(ValueError, match="multiples of 16"):
        quantize(x[:20], E4M3, "block_1x128", transposed=True)
    quantized = {s: one(x, E4M3, s) for s in ("tensorwise", "block_1x128", "block_128x128")}
    with pytest.raises(ValueError, match="two E5M2"):
        scaled_matmul(one(x, E5M2, "block_1x128"), one(x, E5M2, "block_1x128"), torch.float32)
    with pytest.raises(ValueError, match="scaled block_128x128 and block_128x128"):
        scaled_matmul(quantized["block_128x128"], quantized["block_128x128"], torch.float32)
    with pytest.raises(ValueError, match="scaled tensorwise and block_1x128"):
        scaled_matmul(quantized["tensorwise"], quantized["block_1x128"], torch.float32)
    with pytest.raises(ValueError, match="multiples of 16, not"):
        scaled_matmul(one(x[:20], E4M3, "block_1x128"), quantized["block_1x128"], torch.float32)

"""FP8 products on a GPU, against fp32 products of what the FP8 numbers stand for."""

import itertools

import pytest
import torch

from engine.ops.fp8 import add_scaled_matmul, dequantised, scaled_matmul, turned
from engine.ops.quantize import Quantised, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACCURATE, FAST, BF16 = 2e-3, 1e-2, 3e-3  # relative L2; BF16 has a rounding of the result on top
PAIRS = {  # what the three products of a layer multiply
    "tensors": ("tensor", E4M3, "tensor", E4M3),
    "a gradient with a weight": ("tensor", E5M2, "tensor", E4M3),
    "a weight with a gradient": ("tensor", E4M3, "tensor", E5M2),
    "rows with squares": ("rows", E4M3, "squares", E4M3),
    "squares with rows": ("squares", E4M3, "rows", E4M3),
    "rows with rows": ("rows", E4M3, "rows", E4M3),
}
SIZES = [(16, 16, 16), (128, 128, 128), (256, 384, 512), (48, 80, 144), (2048, 4096, 11008), (12288, 4096, 8192)]
BY = [(pair, "cublaslt") for pair in PAIRS] + [(pair, "triaxis") for pair in ("rows with squares", "rows with rows")]
ADDED = [(pair, by) for pair, by in BY if pair in ("tensors", "a gradient with a weight", "rows with rows")]


def quantised(rows: int, columns: int, scaling: str, dtype: torch.dtype) -> Quantised:
    """Random numbers whose rows, and whose stretches of a row, differ in size."""
    x = torch.randn(rows, columns) * torch.logspace(-1, 1, columns) * torch.logspace(-1, 1, rows)[:, None]
    scale = torch.finfo(dtype).max / x.abs().amax().view(1) if scaling == "tensor" else None
    result, _ = quantize(x.bfloat16(), dtype, scaling, scale=scale, power_of_two=scaling != "tensor")
    return result


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def factors(pair: str, size: tuple[int, int, int]):
    """Both factors, and their product in fp32."""
    a_scaling, a_dtype, b_scaling, b_dtype = PAIRS[pair]
    if a_scaling != "tensor" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("blocks have scales on compute capability 9.0 alone")
    torch.manual_seed(sum(size))
    m, n, k = size
    a, b = quantised(m, k, a_scaling, a_dtype), quantised(n, k, b_scaling, b_dtype)
    return a, b, dequantised(a) @ dequantised(b).t()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair, by", BY)
def test_products(emulated, pair, by, size):
    a, b, expected = factors(pair, size)
    assert error(scaled_matmul(a, b, torch.float32, by=by), expected) < ACCURATE
    assert error(scaled_matmul(a, b, torch.bfloat16, by=by), expected) < BF16
    if a.scaling == "tensor":
        assert error(scaled_matmul(a, b, torch.bfloat16, fast=True, by=by), expected) < FAST


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair, by", ADDED)
def test_products_that_accumulate(emulated, pair, by, size):
    a, b, product = factors(pair, size)
    start = torch.randn_like(product) * product.std()
    out = start.clone()
    for _ in range(2):
        add_scaled_matmul(out, a, b, by=by)
    assert error(out - start, 2 * product) < ACCURATE


def test_a_product_of_shapes_in_turn_is_that_of_its_own_plan(emulated):
    """What was decided for one shape or format serves no other."""
    chosen = list(itertools.product(("tensors", "a gradient with a weight"), SIZES[:4]))
    for pair, size in chosen + chosen[::-1]:
        a, b, expected = factors(pair, size)
        assert error(scaled_matmul(a, b, torch.float32), expected) < ACCURATE


def test_bias(emulated):
    a, b, expected = factors("tensors", (128, 256, 512))
    bias = torch.randn(256, dtype=torch.bfloat16)
    got = torch.ops.triaxis.fp8_matmul(
        a.values, b.values, a.scales, b.scales, a.scaling, b.scaling, bias, torch.bfloat16, False
    )
    assert error(got, expected + bias.float()) < BF16


@pytest.mark.parametrize("scaling", ["tensor", "rows"])
def test_turned(emulated, scaling):
    """Turning is exact for one scale; rows of blocks are quantised once more."""
    torch.manual_seed(0)
    x = quantised(256, 384, scaling, E4M3)
    got, expected = dequantised(turned(x)), dequantised(x).t()
    assert torch.equal(got, expected) if scaling == "tensor" else error(got, expected) < 0.05


def test_by_torch(emulated):
    """What runs without csrc."""
    a, b, expected = factors("tensors", (128, 256, 512))
    assert error(scaled_matmul(a, b, torch.bfloat16, by="torch"), expected) < BF16
    out = torch.zeros_like(expected)
    add_scaled_matmul(out, a, b, by="torch")
    assert error(out, expected) < ACCURATE


@pytest.mark.parametrize("pair", ["tensors", "rows with squares"])
def test_opcheck(emulated, pair):
    """Of the operators that run on a GPU alone."""
    a, b, product = factors(pair, (32, 48, 256))
    given = (a.values, b.values, a.scales, b.scales, a.scaling, b.scaling)
    torch.library.opcheck(torch.ops.triaxis.fp8_matmul.default, (*given, None, torch.bfloat16, False))
    if pair == "tensors":
        torch.library.opcheck(torch.ops.triaxis.fp8_matmul_add_.default, (product, *given))


def test_runs_on_the_current_stream(emulated):
    a, b, expected = factors("tensors", (128, 256, 512))
    late = Quantised(torch.zeros_like(a.values.view(torch.uint8)).view(E4M3), a.scales, "tensor")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.values.copy_(a.values)
        got = scaled_matmul(late, b, torch.float32)
    stream.synchronize()
    assert error(got, expected) < ACCURATE

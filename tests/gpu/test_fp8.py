"""FP8 products on a GPU, against fp32 products of what the FP8 numbers stand for."""

import itertools

import pytest
import torch

from engine.ops.fp8 import add_scaled_matmul, dequantize, scaled_matmul, transpose
from engine.ops.quantize import QuantizedTensor, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACCURATE, FAST, BF16 = 2e-3, 1e-2, 3e-3  # relative L2; BF16 has a rounding of the result on top
PAIRS = {  # what the three products of a layer multiply
    "tensors": ("tensorwise", E4M3, "tensorwise", E4M3),
    "a gradient with a weight": ("tensorwise", E5M2, "tensorwise", E4M3),
    "a weight with a gradient": ("tensorwise", E4M3, "tensorwise", E5M2),
    "rows with squares": ("block_1x128", E4M3, "block_128x128", E4M3),
    "squares with rows": ("block_128x128", E4M3, "block_1x128", E4M3),
    "rows with rows": ("block_1x128", E4M3, "block_1x128", E4M3),
}
SIZES = [(16, 16, 16), (128, 128, 128), (256, 384, 512), (48, 80, 144), (2048, 4096, 11008), (12288, 4096, 8192)]
IMPLS = [(pair, "cublaslt") for pair in PAIRS] + [(pair, "triaxis") for pair in ("rows with squares", "rows with rows")]
ADDED = [(pair, impl) for pair, impl in IMPLS if pair in ("tensors", "a gradient with a weight", "rows with rows")]


def quantized(rows: int, columns: int, scaling: str, dtype: torch.dtype) -> QuantizedTensor:
    """Random numbers whose rows, and whose stretches of a row, differ in size."""
    x = torch.randn(rows, columns) * torch.logspace(-1, 1, columns) * torch.logspace(-1, 1, rows)[:, None]
    scale = torch.finfo(dtype).max / x.abs().amax().view(1) if scaling == "tensorwise" else None
    result, _ = quantize(x.bfloat16(), dtype, scaling, scale=scale, power_of_two=scaling != "tensorwise")
    return result


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def factors(pair: str, size: tuple[int, int, int]):
    """Both factors, and their product in fp32."""
    a_scaling, a_dtype, b_scaling, b_dtype = PAIRS[pair]
    if a_scaling != "tensorwise" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("blocks have scales on compute capability 9.0 alone")
    torch.manual_seed(sum(size))
    m, n, k = size
    a, b = quantized(m, k, a_scaling, a_dtype), quantized(n, k, b_scaling, b_dtype)
    return a, b, dequantize(a) @ dequantize(b).t()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair, impl", IMPLS)
def test_products(emulated, pair, impl, size):
    a, b, expected = factors(pair, size)
    assert error(scaled_matmul(a, b, torch.float32, impl=impl), expected) < ACCURATE
    assert error(scaled_matmul(a, b, torch.bfloat16, impl=impl), expected) < BF16
    if a.scaling == "tensorwise":
        assert error(scaled_matmul(a, b, torch.bfloat16, fast=True, impl=impl), expected) < FAST


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair, impl", ADDED)
def test_products_that_accumulate(emulated, pair, impl, size):
    a, b, product = factors(pair, size)
    start = torch.randn_like(product) * product.std()
    out = start.clone()
    for _ in range(2):
        add_scaled_matmul(out, a, b, impl=impl)
    assert error(out - start, 2 * product) < ACCURATE


def test_a_product_of_shapes_in_turn_is_that_of_its_own_plan(emulated):
    """What was decided for one shape or format serves no other."""
    chosen = list(itertools.product(("tensors", "a gradient with a weight"), SIZES[:4]))
    for pair, size in chosen + chosen[::-1]:
        a, b, expected = factors(pair, size)
        assert error(scaled_matmul(a, b, torch.float32), expected) < ACCURATE


@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
def test_transposed(emulated, scaling):
    """Turning is exact for one scale; rows of blocks are quantized once more."""
    torch.manual_seed(0)
    x = quantized(256, 384, scaling, E4M3)
    got, expected = dequantize(transpose(x)), dequantize(x).t()
    assert torch.equal(got, expected) if scaling == "tensorwise" else error(got, expected) < 0.05


def test_with_pytorch(emulated):
    """What runs without csrc."""
    a, b, expected = factors("tensors", (128, 256, 512))
    assert error(scaled_matmul(a, b, torch.bfloat16, impl="torch"), expected) < BF16
    out = torch.zeros_like(expected)
    add_scaled_matmul(out, a, b, impl="torch")
    assert error(out, expected) < ACCURATE


@pytest.mark.parametrize("pair", ["tensors", "rows with squares"])
def test_opcheck(emulated, pair):
    """Of the operators that run on a GPU alone."""
    a, b, product = factors(pair, (32, 48, 256))
    given = (a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling)
    torch.library.opcheck(torch.ops.triaxis.fp8_matmul.default, (*given, torch.bfloat16, False))
    if pair == "tensors":
        torch.library.opcheck(torch.ops.triaxis.fp8_matmul_add_.default, (product, *given))


def test_runs_on_the_current_stream(emulated):
    a, b, expected = factors("tensors", (128, 256, 512))
    late = QuantizedTensor(torch.zeros_like(a.values.view(torch.uint8)).view(E4M3), a.scale_inv, "tensorwise")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.values.copy_(a.values)
        got = scaled_matmul(late, b, torch.float32)
    stream.synchronize()
    assert error(got, expected) < ACCURATE

"""FP8 matmuls on a GPU, against fp32 matmuls of the dequantized operands."""

import itertools

import pytest
import torch

from engine.ops.fp8 import add_scaled_matmul, dequantize, scaled_matmul, transpose
from engine.ops.quantize import QuantizedTensor, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACCURATE, FAST, BF16 = 2e-3, 1e-2, 3e-3  # relative L2; BF16: the result is rounded as well
PAIRS = {  # operands of the three matmuls of a layer
    "tensors": ("tensorwise", E4M3, "tensorwise", E4M3),
    "a gradient with a weight": ("tensorwise", E5M2, "tensorwise", E4M3),
    "a weight with a gradient": ("tensorwise", E4M3, "tensorwise", E5M2),
    "1x128 with 128x128": ("block_1x128", E4M3, "block_128x128", E4M3),
    "128x128 with 1x128": ("block_128x128", E4M3, "block_1x128", E4M3),
    "1x128 with 1x128": ("block_1x128", E4M3, "block_1x128", E4M3),
}
SIZES = [(16, 16, 16), (128, 128, 128), (256, 384, 512), (48, 80, 144), (2048, 4096, 11008), (12288, 4096, 8192)]
IMPLS = [(pair, "cublaslt") for pair in PAIRS] + [
    (pair, "triaxis") for pair in ("1x128 with 128x128", "1x128 with 1x128")
]
ADDED = [(pair, impl) for pair, impl in IMPLS if pair in ("tensors", "a gradient with a weight", "1x128 with 1x128")]


def quantized(rows: int, columns: int, scaling: str, dtype: torch.dtype) -> QuantizedTensor:
    """Random values whose magnitude differs between rows and along a row."""
    x = torch.randn(rows, columns) * torch.logspace(-1, 1, columns) * torch.logspace(-1, 1, rows)[:, None]
    amax = x.abs().amax().view(1) if scaling == "tensorwise" else None
    result, _ = quantize(x.bfloat16(), dtype, scaling, amax=amax, power_of_two=scaling != "tensorwise")
    return result


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def operands(pair: str, size: tuple[int, int, int]):
    """Both operands, and their matmul in fp32."""
    a_scaling, a_dtype, b_scaling, b_dtype = PAIRS[pair]
    if a_scaling != "tensorwise" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("block scales need compute capability 9.0")
    torch.manual_seed(sum(size))
    m, n, k = size
    a, b = quantized(m, k, a_scaling, a_dtype), quantized(n, k, b_scaling, b_dtype)
    return a, b, dequantize(a) @ dequantize(b).t()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair, impl", IMPLS)
def test_matmuls(emulated, pair, impl, size):
    a, b, expected = operands(pair, size)
    assert error(scaled_matmul(a, b, torch.float32, impl=impl), expected) < ACCURATE
    assert error(scaled_matmul(a, b, torch.bfloat16, impl=impl), expected) < BF16
    if a.scaling == "tensorwise":
        assert error(scaled_matmul(a, b, torch.bfloat16, fast=True, impl=impl), expected) < FAST


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair, impl", ADDED)
def test_matmuls_that_accumulate(emulated, pair, impl, size):
    a, b, product = operands(pair, size)
    start = torch.randn_like(product) * product.std()
    out = start.clone()
    for _ in range(2):
        add_scaled_matmul(out, a, b, impl=impl)
    assert error(out - start, 2 * product) < ACCURATE


def test_plans_of_shapes_and_formats_are_not_mixed_up(emulated):
    chosen = list(itertools.product(("tensors", "a gradient with a weight"), SIZES[:4]))
    for pair, size in chosen + chosen[::-1]:
        a, b, expected = operands(pair, size)
        assert error(scaled_matmul(a, b, torch.float32), expected) < ACCURATE


@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
def test_transposed(emulated, scaling):
    """Exact for one scale a tensor; blocks of 1 × 128 are quantized again."""
    torch.manual_seed(0)
    x = quantized(256, 384, scaling, E4M3)
    got, expected = dequantize(transpose(x)), dequantize(x).t()
    assert torch.equal(got, expected) if scaling == "tensorwise" else error(got, expected) < 0.05


def test_with_pytorch(emulated):
    """The implementation without csrc."""
    a, b, expected = operands("tensors", (128, 256, 512))
    assert error(scaled_matmul(a, b, torch.bfloat16, impl="torch"), expected) < BF16
    out = torch.zeros_like(expected)
    add_scaled_matmul(out, a, b, impl="torch")
    assert error(out, expected) < ACCURATE


@pytest.mark.parametrize("pair", ["tensors", "1x128 with 128x128"])
def test_opcheck(emulated, pair):
    """For the operators that run only on a GPU."""
    a, b, product = operands(pair, (32, 48, 256))
    given = (a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling)
    torch.library.opcheck(torch.ops.triaxis.fp8_matmul.default, (*given, torch.bfloat16, False))
    if pair == "tensors":
        torch.library.opcheck(torch.ops.triaxis.fp8_matmul_add_.default, (product, *given))


def test_runs_on_the_current_stream(emulated):
    a, b, expected = operands("tensors", (128, 256, 512))
    late = QuantizedTensor(torch.zeros_like(a.values.view(torch.uint8)).view(E4M3), a.scale_inv, "tensorwise")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.values.copy_(a.values)
        got = scaled_matmul(late, b, torch.float32)
    stream.synchronize()
    assert error(got, expected) < ACCURATE

"""csrc/kernels/quantize.cu, run on the host, against its reference and bit by bit."""

from pathlib import Path

import pytest
import torch

from csrc import build
from engine.ops.quantize import quantize_reference, scale_inv_from_amax

ROOT = Path(__file__).parents[2]
ops = torch.ops.triaxis
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("rows, columns", [(16, 16), (128, 128), (144, 272), (32, 400)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128", "block_128x128"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_as_the_reference(emulated, rows, columns, source, dtype, scaling, power_of_two):
    torch.manual_seed(rows)
    x = (torch.randn(rows, columns + 8) * torch.logspace(-3, 2, columns + 8)).to(source)[:, :columns]
    scale = torch.tensor([3.7]) if scaling == "tensorwise" else None
    amax = [torch.tensor([1.0]), torch.tensor([1.0])]
    expected = quantize_reference(x, dtype, scaling, True, True, scale, amax[0], power_of_two)
    for seed in range(2):
        emulated(seed)
        got = ops.quantize(x, dtype, scaling, True, True, scale, amax[1], power_of_two)
        for a, b in zip(got[:2], expected[:2], strict=True):
            assert torch.equal(bits(a), bits(b))
        for a, b in zip(got[2:], expected[2:], strict=True):
            assert torch.equal(a, b)
    if scaling == "tensorwise":
        assert torch.equal(*amax)
        assert amax[1].item() == x.float().abs().max().item()


def test_flat_parts_of_a_weight_have_the_values_of_the_whole(emulated):
    """What ranks that gather weights in FP8 rely on: their shards cut rows, and transposing values is exact."""
    torch.manual_seed(0)
    weight, scale = torch.randn(48, 272).bfloat16(), torch.tensor([3.7])
    dtype = torch.float8_e4m3fn
    whole, transposed, *_ = ops.quantize(weight, dtype, "tensorwise", True, True, scale, None, False)
    parts = weight.flatten().split(128 * 7)
    values = [
        ops.quantize(part.view(-1, 128), dtype, "tensorwise", True, False, scale, None, False)[0] for part in parts
    ]
    assert len(parts) == 15
    assert torch.equal(torch.cat([bits(value).flatten() for value in values]), bits(whole).flatten())
    assert torch.equal(bits(whole).t(), bits(transposed))


EVERY_AMAX = """
#include "common/fp8.cuh"
#include <cstdio>

// For every float amax from 1e-4 on: the scale in integers, and by division.
template <__nv_fp8_interpretation_t kType>
long differences() {
  long different = 0;
  for (int bits = __float_as_int(triaxis::kMinAmax); bits < 0x7f800000; ++bits) {
    const float amax = __int_as_float(bits);
    const auto scale = triaxis::scale_from_amax<kType, true>(amax);
    const int quotient = __float_as_int(amax / triaxis::max_value(kType)), power = quotient & 0x7f800000;
    different += __float_as_int(scale.inv) != (quotient == power ? power : power + (1 << 23));
    different += scale.scale * scale.inv != 1.0f;
  }
  return different;
}

int main() { std::printf("%ld %ld\\n", differences<__NV_E4M3>(), differences<__NV_E5M2>()); }
"""


def test_powers_of_two_are_right_for_every_float(toolchain, tmp_path):
    """Exhaustive: 1.2 · 10⁹ maxima for each format, in seconds."""
    source, program = tmp_path / "every_amax.cpp", tmp_path / "every_amax"
    source.write_text(EVERY_AMAX, encoding="utf-8")
    flags = ["-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", f"-isystem{toolchain.cuda}/include"]
    build.run([toolchain.cxx, *flags, str(source), "-o", str(program)])
    assert build.run([str(program)]).split() == ["0", "0"]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_powers_of_two_are_those_of_the_reference(emulated, dtype):
    """At every exponent, the largest FP8 value and its neighbors, which decide between two powers."""
    amax = torch.tensor([1.75, 1.0, 1.9]).repeat(141) * torch.arange(-13, 128).repeat_interleave(3).double().exp2()
    amax = amax.float()
    amax = torch.cat([amax, amax.nextafter(torch.tensor(torch.inf)), amax.nextafter(torch.tensor(0.0))])
    amax = amax[amax.isfinite() & (amax >= 1e-4)]
    x = torch.zeros(-(-len(amax) // 16) * 16, 16)
    x[: len(amax), 3] = -amax
    scales = ops.quantize(x, dtype, "block_1x128", True, False, None, None, True)[2]
    assert torch.equal(scales[0], scale_inv_from_amax(x.abs().amax(1), dtype, True))


def all_finite(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_rounds_to_nearest_even_and_saturates(emulated, dtype):
    """Every FP8 value, every midpoint of two, and values beyond the largest, against a search among all FP8 values."""
    grid = all_finite(dtype).unique()
    midpoints = (grid[1:] + grid[:-1]) / 2
    largest = grid.max()
    x = torch.cat(
        (grid, midpoints, midpoints.nextafter(grid.max()), torch.tensor([2e5, -2e5, 1.01 * largest, torch.inf]))
    )
    x = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(16, -1)
    got = ops.quantize(x, dtype, "tensorwise", True, False, torch.ones(1), None, False)[0]
    distance = (x.flatten()[:, None].clamp(-largest, largest) - grid).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = bits(grid.to(dtype)) % 2 == 0
    tie = nearest.sum(1) > 1
    choice = torch.where(tie[:, None], nearest & even, nearest).int().argmax(1)
    assert torch.equal(got.float().flatten(), grid[choice])


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_nan_stays_nan(emulated, dtype):
    x = torch.ones(16, 128)
    x[3, 4] = torch.nan
    for scaling, scale in (("tensorwise", torch.ones(1)), ("block_1x128", None), ("block_128x128", None)):
        values = ops.quantize(x, dtype, scaling, True, False, scale, None, False)[0].float()
        assert values[3, 4].isnan()
        assert values.isnan().sum() == 1


@pytest.mark.parametrize("power_of_two", [False, True])
def test_infinity_becomes_nan(emulated, power_of_two):
    """A block with an infinity has no scale: its infinities become NaN, in the kernel and in the reference."""
    x = torch.ones(16, 256)
    x[3, 4] = torch.inf
    for run in (ops.quantize, quantize_reference):
        values = run(x, FP8[0], "block_1x128", True, False, None, None, power_of_two)[0].float()
        assert values[3, 4].isnan()
        assert values[:, 128:].isfinite().all()


def test_zeros_have_a_scale(emulated):
    values, _, scales, _ = ops.quantize(torch.zeros(16, 256), FP8[0], "block_1x128", True, False, None, None, False)
    assert (values.float() == 0).all()
    assert (scales > 0).all()


def test_wrong_arguments_are_named(emulated):
    x = torch.randn(16, 24)
    with pytest.raises(RuntimeError, match="FP8 takes multiples of 16"):
        ops.quantize(x, FP8[0], "block_1x128", True, False, None, None, False)
    with pytest.raises(RuntimeError, match="needs a scale"):
        ops.quantize(x[:, :16], FP8[0], "tensorwise", True, False, None, None, False)
    with pytest.raises(RuntimeError, match="'tensorwise', 'block_1x128' or 'block_128x128'"):
        ops.quantize(x[:, :16], FP8[0], "columns", True, False, None, None, False)
    with pytest.raises(RuntimeError, match="expected float8_e4m3fn or float8_e5m2"):
        ops.quantize(x[:, :16], torch.bfloat16, "block_1x128", True, False, None, None, False)


FUSED = [("block_1x128", False), ("block_1x128", True), ("tensorwise", False)]


@pytest.mark.parametrize("columns", [16, 128, 144, 520 * 2, 8192])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling, power_of_two", FUSED)
def test_fused_norms_equal_norm_then_quantize(emulated, columns, source, scaling, power_of_two):
    torch.manual_seed(columns)
    emulated(columns)
    x, residual, weight, bias = (
        torch.randn(*size).to(source) for size in ((6, columns), (6, columns), (columns,), (columns,))
    )
    scale = torch.tensor([20.0]) if scaling == "tensorwise" else None
    for arguments in (
        (x, residual, weight, None, 1e-5, False),
        (x, None, weight, bias, 1e-5, True),
    ):
        amax = [torch.tensor([1.0]), torch.tensor([1.0])]
        y, *beside = ops.norm_forward(*arguments)
        values, _, scales, _ = ops.quantize(y, FP8[0], scaling, True, False, scale, amax[0], power_of_two)
        got, got_scales, *got_beside = ops.norm_forward_fp8(*arguments, scaling, scale, amax[1], power_of_two)
        assert torch.equal(bits(got), bits(values))
        assert torch.equal(got_scales, scales)
        assert torch.equal(*amax)
        assert all(torch.equal(a, b) for a, b in zip(got_beside, beside, strict=True))


@pytest.mark.parametrize("columns", [16, 128, 144, 1376])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling, power_of_two", FUSED)
def test_fused_swiglu_equals_swiglu_then_quantize(emulated, columns, source, scaling, power_of_two):
    torch.manual_seed(columns)
    emulated(columns)
    gate_up = torch.randn(5, 2 * columns).to(source)
    scale = torch.tensor([20.0]) if scaling == "tensorwise" else None
    amax = [torch.tensor([0.1]), torch.tensor([0.1])]
    out = ops.swiglu_forward(gate_up)
    values, _, scales, _ = ops.quantize(out, FP8[0], scaling, True, False, scale, amax[0], power_of_two)
    got, got_scales = ops.swiglu_forward_fp8(gate_up, scaling, scale, amax[1], power_of_two)
    assert torch.equal(bits(got), bits(values))
    assert torch.equal(got_scales, scales)
    assert torch.equal(*amax)


def test_a_missing_barrier_shows(broken):
    line = "store(tile + transposed_at(at.across * kSize + j, at.down), bytes[j]);\n  __syncthreads();"
    code, output = broken(
        "kernels/quantize.cu", line, line.replace("  __syncthreads();", ""), f"{__file__}::test_as_the_reference"
    )
    assert code == 1, output

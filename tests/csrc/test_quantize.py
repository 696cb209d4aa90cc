"""csrc/kernels/quantize.cu, run on the host, against its reference and bit by bit."""

from pathlib import Path

import pytest
import torch

from csrc import build
from engine.ops.quantize import MIN_AMAX, amax_reference, quantize_reference, scale_from_amax, scale_inv_from_amax

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


# nothing; numbers around what is as small, and as large, as scales get; NaN
MAXIMA = [0.0, 1e-45, 1e-38, 3.7e-37, 1e-4, 0.3, 1.0, 3.3, 448.0, 57344.0, 3e38, torch.inf, torch.nan]


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row_major, transposed", [(True, True), (True, False), (False, True)])
def test_a_scale_from_the_amax(emulated, source, dtype, row_major, transposed):
    """Bitwise what quantizing by the scale gives, and the scale's reciprocal; the amax is only read."""
    torch.manual_seed(0)
    x = (torch.randn(144, 272) * torch.logspace(-3, 2, 272)).to(source)
    for value in [*MAXIMA, x.abs().max().item()]:
        amax = torch.tensor([value])
        scale = scale_from_amax(amax, dtype)
        assert value > 0 or scale.item() == 1
        form = (dtype, "tensorwise", row_major, transposed)
        *expected, _, _ = ops.quantize(x, *form, scale, None, False)
        for run in (ops.quantize, quantize_reference):
            *values, scale_inv, other = run(x, *form, None, amax, False)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(values, expected, strict=True)), value
            assert torch.equal(scale_inv, scale.reciprocal()), value
            assert other.numel() == 0
        assert torch.equal(bits(amax), bits(torch.tensor([value])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023, 4096, 4100, 100_003])
def test_the_amax_of_a_tensor(emulated, size, dtype):
    """Wherever it is, of either sign, also if the tensor starts between two vectors; what is there is not lowered."""
    torch.manual_seed(size)
    whole = torch.randn(size + 1).to(dtype)
    for seed, x in enumerate((whole[:size], whole[1:])):
        emulated(seed)
        for at, value in ((0, 9.0), (size // 2, -11.5), (size - 1, 100.0), (0, -torch.inf), (size - 1, torch.nan)):
            if size:
                x[at] = value
            got, expected = torch.tensor([2.5]), torch.tensor([2.5])
            ops.amax_(got, x)
            amax_reference(expected, x)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        if size:
            assert got.isnan()


def test_the_amax_of_a_part_of_each_row(emulated):
    x = torch.arange(-20.0, 20).view(4, 10)
    ops.amax_(amax := torch.zeros(1), x[:, 3:7])
    assert amax.item() == 17


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

// For every float amax from the smallest on: the scale in integers, and by division.
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
    """Exhaustive: 1.9 · 10⁹ maxima for each format, in seconds."""
    source, program = tmp_path / "every_amax.cpp", tmp_path / "every_amax"
    source.write_text(EVERY_AMAX, encoding="utf-8")
    flags = ["-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", f"-isystem{toolchain.cuda}/include"]
    build.run([toolchain.cxx, *flags, str(source), "-o", str(program)])
    assert build.run([str(program)]).split() == ["0", "0"]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_powers_of_two_are_those_of_the_reference(emulated, dtype):
    """At every exponent, the largest FP8 value and its neighbors, which decide between two powers."""
    amax = torch.tensor([1.75, 1.0, 1.9]).repeat(228) * torch.arange(-100, 128).repeat_interleave(3).double().exp2()
    amax = amax.float()
    amax = torch.cat([amax, amax.nextafter(torch.tensor(torch.inf)), amax.nextafter(torch.tensor(0.0))])
    amax = amax[amax.isfinite() & (amax >= MIN_AMAX)]
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
    with pytest.raises(RuntimeError, match="needs a scale, or the amax of x"):
        ops.quantize(x[:, :16], FP8[0], "tensorwise", True, False, None, None, False)
    with pytest.raises(RuntimeError, match="'tensorwise', 'block_1x128' or 'block_128x128'"):
        ops.quantize(x[:, :16], FP8[0], "columns", True, False, None, None, False)
    with pytest.raises(RuntimeError, match="expected float8_e4m3fn or float8_e5m2"):
        ops.quantize(x[:, :16], torch.bfloat16, "block_1x128", True, False, None, None, False)


FUSED = ["block_1x128", "tensorwise"]


@pytest.mark.parametrize("columns", [16, 128, 144, 520 * 2, 8192])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", FUSED)
def test_fused_norms_equal_norm_then_quantize(emulated, columns, source, scaling):
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
        values, _, scales, _ = ops.quantize(y, FP8[0], scaling, True, False, scale, amax[0], True)
        got, got_scales, *got_beside = ops.norm_forward_fp8(*arguments, scaling, scale, amax[1])
        assert torch.equal(bits(got), bits(values))
        assert torch.equal(got_scales, scales)
        assert torch.equal(*amax)
        assert all(torch.equal(a, b) for a, b in zip(got_beside, beside, strict=True))


@pytest.mark.parametrize("columns", [16, 128, 144, 1376])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", FUSED)
def test_fused_swiglu_equals_swiglu_then_quantize(emulated, columns, source, scaling):
    torch.manual_seed(columns)
    emulated(columns)
    gate_up = torch.randn(5, 2 * columns).to(source)
    scale = torch.tensor([20.0]) if scaling == "tensorwise" else None
    amax = [torch.tensor([0.1]), torch.tensor([0.1])]
    out = ops.swiglu_forward(gate_up)
    values, _, scales, _ = ops.quantize(out, FP8[0], scaling, True, False, scale, amax[0], True)
    got, no_transpose, got_scales = ops.swiglu_forward_fp8(gate_up, scaling, scale, amax[1])
    assert torch.equal(bits(got), bits(values))
    assert no_transpose.numel() == 0
    assert torch.equal(got_scales, scales)
    assert torch.equal(*amax)


@pytest.mark.parametrize("rows, columns", [(16, 16), (128, 256), (144, 1376)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_swiglu_writes_the_transpose_too(emulated, rows, columns, source):
    """With rows that are parts of longer ones, and an element that is no number."""
    torch.manual_seed(columns)
    emulated(columns)
    gate_up = torch.randn(rows, 2 * columns + 8).to(source)[:, : 2 * columns]
    gate_up[3, 5] = torch.nan
    scale, amax = torch.tensor([20.0]), [torch.tensor([0.1]), torch.tensor([0.1])]
    expected = ops.quantize(ops.swiglu_forward(gate_up), FP8[0], "tensorwise", True, True, scale, amax[0], False)
    got = ops.swiglu_forward_fp8(gate_up, "tensorwise", scale, amax[1], True)
    for a, b in zip(got, expected[:3], strict=True):
        assert torch.equal(bits(a), bits(b))
    assert torch.equal(bits(amax[0]), bits(amax[1]))
    with pytest.raises(RuntimeError, match="transposed: expected scaling 'tensorwise' and rows that are a multiple"):
        ops.swiglu_forward_fp8(gate_up[:8], "tensorwise", scale, amax[1], True)
    with pytest.raises(RuntimeError, match="transposed: expected scaling 'tensorwise'"):
        ops.swiglu_forward_fp8(gate_up, "block_1x128", None, None, True)


@pytest.mark.parametrize("columns", [16, 77, 128, 1040, 4000, 8192])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_swiglu_take_the_amax_of_what_they_write(emulated, columns, source):
    """Of the rounded output, which it does not change; raised, not lowered; NaN if an element is."""
    torch.manual_seed(columns)
    emulated(columns)
    x, residual, weight, bias = (
        torch.randn(*size).to(source) for size in ((7, columns), (7, columns), (columns,), (columns,))
    )
    calls = [
        (ops.norm_forward, ops.norm_forward, (x, None, weight, None, 1e-5, False)),
        (ops.norm_forward, ops.norm_forward, (x, residual, weight, bias, 1e-5, True)),
        (ops.swiglu_forward, ops.swiglu_forward_amax, (torch.randn(7, 2 * columns).to(source),)),
    ]
    for op, with_amax, arguments in calls:
        for start, broken in ((0.0, False), (1e3, False), (0.0, True)):
            given = arguments[0].clone()
            if broken:
                given[5, columns - 1] = torch.nan
            amax = torch.tensor([start])
            plain, got = op(given, *arguments[1:]), with_amax(given, *arguments[1:], amax)
            torch.testing.assert_close(got, plain, rtol=0, atol=0, equal_nan=True)
            amax_reference(expected := torch.tensor([start]), plain if isinstance(plain, torch.Tensor) else plain[0])
            torch.testing.assert_close(amax, expected, rtol=0, atol=0, equal_nan=True)
            assert amax.isnan() == broken


def test_the_amax_of_a_given_scale_keeps_nan(emulated):
    x = torch.ones(16, 128)
    x[3, 4] = torch.nan
    ops.quantize(x, FP8[0], "tensorwise", True, False, torch.ones(1), amax := torch.zeros(1), False)
    assert amax.isnan()


def test_a_missing_barrier_shows(broken):
    store = "store(memory.bytes + transposed_at(at.across * kTileColumns + j, at.down * kRows), bytes[j]);\n"
    code, output = broken("common/tile.cuh", f"{store}  __syncthreads();", store, f"{__file__}::test_as_the_reference")
    assert code == 1, output

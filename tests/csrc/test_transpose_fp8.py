"""Transposing FP8 in csrc/kernels/quantize.cu, run on the host, bit by bit."""

import pytest
import torch

from engine.ops.fp8 import dequantize, transpose_reference
from engine.ops.quantize import QuantizedTensor

ops = torch.ops.triaxis
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = [(16, 16), (128, 128), (144, 272), (272, 144), (32, 400)]


def bits(x):
    return x.view(torch.uint8)


def rows_of(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and powers of two, in blocks along rows that differ by up to 2^17, so that some become subnormal."""
    x = torch.randn(rows, columns) * torch.logspace(-3, 2, columns) * torch.logspace(2, -1, rows)[:, None]
    values, _, scale_inv, _ = ops.quantize(x.bfloat16(), dtype, "block_1x128", True, False, None, None, True)
    return values, scale_inv


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_one_scale_moves_every_byte(emulated, rows, columns, dtype):
    torch.manual_seed(rows)
    values = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).view(dtype)  # NaN and infinities, too
    for seed in range(2):
        emulated(seed)
        got, no_scale = ops.transpose_fp8(values, torch.ones(1), "tensorwise")
        assert torch.equal(bits(got), bits(values).t())
        assert no_scale.numel() == 0
    assert torch.equal(bits(transpose_reference(values, torch.ones(1), "tensorwise")[0]), bits(got))


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_blocks_are_those_of_the_dequantized_matrix(emulated, rows, columns, dtype):
    """Bit by bit what bf16 copies of the matrix gave, which are exact for powers of two."""
    torch.manual_seed(columns)
    values, scale_inv = rows_of(rows, columns, dtype)
    wide = dequantize(QuantizedTensor(values, scale_inv, "block_1x128"))
    assert torch.equal(wide.bfloat16().float(), wide)
    _, expected, _, expected_scales = ops.quantize(wide.bfloat16(), dtype, "block_1x128", False, True, None, None, True)
    for seed in range(2):
        emulated(seed)
        got, scales = ops.transpose_fp8(values, scale_inv, "block_1x128")
        assert torch.equal(bits(got), bits(expected))
        assert torch.equal(scales, expected_scales)
    got, scales = transpose_reference(values, scale_inv, "block_1x128")
    assert torch.equal(bits(got), bits(expected))
    assert torch.equal(scales, expected_scales)


def test_only_numbers_that_become_subnormal_are_rounded(emulated):
    torch.manual_seed(0)
    values, scale_inv = rows_of(256, 384, FP8[0])
    before = dequantize(QuantizedTensor(values, scale_inv, "block_1x128")).t()
    got, scales = ops.transpose_fp8(values, scale_inv, "block_1x128")
    after = dequantize(QuantizedTensor(got, scales, "block_1x128"))
    unit = scales.t().repeat_interleave(128, 1)[:, :256]
    normal = before.abs() >= 2.0**-6 * unit  # the smallest E4M3 number with all bits
    assert 0.5 < normal.float().mean() < 1
    assert torch.equal(after[normal], before[normal])
    assert (after != before).any()
    assert ((after - before).abs() <= 2.0**-10 * unit)[~normal].all()


def test_scales_that_are_no_powers_of_two(emulated):
    """The kernel and its reference round the same products."""
    x = torch.randn(48, 144)
    values, _, scale_inv, _ = ops.quantize(x, FP8[0], "block_1x128", True, False, None, None, False)
    got, expected = (run(values, scale_inv, "block_1x128") for run in (ops.transpose_fp8, transpose_reference))
    assert torch.equal(bits(got[0]), bits(expected[0]))
    assert torch.equal(got[1], expected[1])


def test_nan_stays_nan_and_spoils_no_other(emulated):
    values, scale_inv = rows_of(32, 144, FP8[0])
    values[3, 5] = torch.nan
    got = ops.transpose_fp8(values, scale_inv, "block_1x128")[0].float()
    assert got[5, 3].isnan()
    assert got.isnan().sum() == 1


def test_part_of_a_larger_tensor(emulated):
    """Rows of a matrix, which start anywhere in its memory."""
    values, scale_inv = rows_of(64, 144, FP8[0])
    part = bits(values).flatten()[3 : 3 + 32 * 144].view(FP8[0]).view(32, 144)
    assert torch.equal(bits(ops.transpose_fp8(part, scale_inv[:, :1], "tensorwise")[0]), bits(part).t())


@pytest.mark.parametrize("rows, columns", [(0, 32), (32, 0)])
def test_nothing(emulated, rows, columns):
    values, scale_inv = torch.empty(rows, columns, dtype=FP8[0]), torch.empty(-(-columns // 128), rows)
    got, scales = ops.transpose_fp8(values, scale_inv, "block_1x128")
    assert got.shape == (columns, rows)
    assert scales.shape == (-(-rows // 128), columns)


def test_wrong_arguments_are_named(emulated):
    values, scale_inv = torch.zeros(16, 32, dtype=FP8[0]), torch.ones(1, 16)
    with pytest.raises(RuntimeError, match="FP8 takes multiples of 16"):
        ops.transpose_fp8(values[:, :24].contiguous(), scale_inv, "tensorwise")
    with pytest.raises(RuntimeError, match="values: expected a dense matrix"):
        ops.transpose_fp8(values[:, :16], scale_inv, "tensorwise")
    with pytest.raises(RuntimeError, match=r"scale_inv: expected dense float32 \[1, 16\]"):
        ops.transpose_fp8(values, scale_inv[:, :8], "block_1x128")
    with pytest.raises(RuntimeError, match="'tensorwise' or 'block_1x128', not 'block_128x128'"):
        ops.transpose_fp8(values, scale_inv, "block_128x128")
    with pytest.raises(RuntimeError, match="values: expected float8_e4m3fn or float8_e5m2"):
        ops.transpose_fp8(values.float(), scale_inv, "tensorwise")

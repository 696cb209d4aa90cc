"""csrc/gemm/fp8_sm90.cu, run on the host, against a matmul of the dequantized operands."""

import pytest
import torch

from engine.ops.fp8 import dequantize
from engine.ops.quantize import QuantizedTensor, quantize

ops = torch.ops.triaxis
E4M3 = torch.float8_e4m3fn


def operand(rows: int, k: int, scaling) -> QuantizedTensor:
    """Every block of 128 along k, in every row, has its own magnitude: no scale can replace another."""
    sizes = torch.exp2(torch.randint(-6, 7, (rows, -(-k // 128))).float())
    x = torch.randn(rows, k) * sizes.repeat_interleave(128, 1)[:, :k]
    result, _ = quantize(x, E4M3, scaling)
    assert result is not None
    return result


def given(a: QuantizedTensor, b: QuantizedTensor):
    return a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling


def expected(a: QuantizedTensor, b: QuantizedTensor):
    return (dequantize(a).double() @ dequantize(b).double().t()).float()


def error(got, exact):
    return ((got.float() - exact).norm() / exact.norm()).item()


# One tile and less of it, edges along each dimension, tiles of several blocks, rings that go round, groups of tiles.
SHAPES = [
    (16, 16, 16),
    (48, 16, 144),
    (192, 128, 128),
    (144, 272, 48),
    (272, 144, 272),
    (400, 128, 1424),
    (1744, 272, 16),
]


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("scaling", ["block_1x128", "block_128x128"])
def test_matmul(emulated, m, n, k, scaling):
    torch.manual_seed(m + n + k)
    a, b = operand(m, k, "block_1x128"), operand(n, k, scaling)
    exact = expected(a, b)
    for seed, dtype, most in ((0, torch.float32, 1e-6), (1, torch.bfloat16, 3e-3)):
        emulated(seed)
        got = ops.fp8_matmul_sm90(*given(a, b), dtype)
        assert got.dtype == dtype
        assert error(got, exact) < most
        # an error in a row of small values counts as well
        by_row = (got.float() - exact).norm(dim=1) / exact.norm(dim=1)
        assert by_row.max() < 4 * most


@pytest.mark.parametrize("scaling", ["block_1x128", "block_128x128"])
def test_adds_to_what_is_there(emulated, scaling):
    torch.manual_seed(0)
    a, b = operand(208, 144, "block_1x128"), operand(144, 144, scaling)
    around = torch.randn(208 + 2, 144)
    out = around[1:-1]
    before = around.clone()
    ops.fp8_matmul_sm90_add_(out, *given(a, b))
    assert error(out - before[1:-1], expected(a, b)) < 1e-5
    assert torch.equal(around[[0, -1]], before[[0, -1]])  # nothing beyond the edges
    once = ops.fp8_matmul_sm90(*given(a, b), torch.float32)
    for start in (torch.zeros_like(once), once):  # exact: zero and twice
        out = start.clone()
        ops.fp8_matmul_sm90_add_(out, *given(a, b))
        assert torch.equal(out, start + once)


def test_of_nothing(emulated):
    a, b = operand(16, 128, "block_1x128"), operand(16, 128, "block_1x128")
    none = QuantizedTensor(a.values[:0], a.scale_inv[:, :0].contiguous(), "block_1x128")
    assert ops.fp8_matmul_sm90(*given(none, b), torch.float32).shape == (0, 16)


def test_not_a_number_stays_in_its_row(emulated):
    a, b = operand(32, 128, "block_1x128"), operand(16, 128, "block_128x128")
    a.values.view(torch.uint8)[3, 5] = 0x7F
    got = ops.fp8_matmul_sm90(*given(a, b), torch.float32)
    assert got[3].isnan().all()
    assert got.isnan().sum() == 16


def test_wrong_arguments_are_named(emulated):
    a, b = operand(16, 128, "block_1x128"), operand(32, 128, "block_128x128")
    with pytest.raises(RuntimeError, match="expected scalings 'block_1x128' and 'block_1x128' or 'block_128x128'"):
        ops.fp8_matmul_sm90(*given(b, a), torch.float32)
    with pytest.raises(RuntimeError, match=r"b_scale_inv: expected dense float32 \[1, 32\]"):
        ops.fp8_matmul_sm90(a.values, b.values, a.scale_inv, b.scale_inv, "block_1x128", "block_1x128", torch.float32)
    with pytest.raises(RuntimeError, match="dtype: expected float32 or bfloat16"):
        ops.fp8_matmul_sm90(*given(a, b), torch.float16)
    with pytest.raises(RuntimeError, match="out: expected float32"):
        ops.fp8_matmul_sm90_add_(torch.zeros(16, 32, dtype=torch.bfloat16), *given(a, b))
    shifted = torch.empty(33 * 128, dtype=E4M3, device=a.values.device)[1 : 32 * 128 + 1].view(32, 128)
    with pytest.raises(RuntimeError, match="b: expected memory that starts at a multiple of 16 bytes"):
        ops.fp8_matmul_sm90(a.values, shifted, a.scale_inv, b.scale_inv, a.scaling, b.scaling, torch.float32)
    e5m2 = a.values.to(torch.float8_e5m2)
    with pytest.raises(RuntimeError, match="a and b: expected float8_e4m3fn"):
        ops.fp8_matmul_sm90(e5m2, b.values, a.scale_inv, b.scale_inv, "block_1x128", "block_128x128", torch.float32)


@pytest.mark.parametrize(
    "old, new",
    [
        (
            "copy(p.a_scale_inv, shared.a_scale_inv[ring.stage], full, k,",
            "copy(p.a_scale_inv, shared.a_scale_inv[ring.stage], full, 0,",
        ),
        ("wait(shared.empty[ring.stage], ring.parity ^ 1);", ""),
        ("    parity ^= 1;\n", ""),
    ],
    ids=["scale of another block", "stage not waited for", "phase not counted"],
)
def test_what_is_broken_shows(broken, old, new):
    code, output = broken("gemm/fp8_sm90.cu", old, new, f"{__file__}::test_matmul[block_1x128-400-128-1424]")
    assert code == 1, output


PROMOTE, FENCE = "      promote<kB1x128>(total, partial, a_scale_inv, b_scale_inv, thread);\n", "      fence_reads();\n"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("k / kScalesOf128 * kScalesOf128", "k", "from column 1, 4 bytes into a row: not a multiple of 16 bytes"),
        ("(0u - shared_address(memory)) % kAlignment", "0", "of shared memory: not a multiple of 1024"),
        (FENCE, "", "fence_reads() is missing"),
        (PROMOTE + FENCE, FENCE + PROMOTE, "fence_reads() is missing"),
        (FENCE, "      if (thread % kWarp == 0) fence_reads();\n", "fence_reads() is missing"),
        ("__syncwarp();", "", "__syncwarp() is missing"),
        ("(kB1x128 ? 0 : k % kScalesOf128)", "0", "AssertionError"),
    ],
    ids=["column", "destination", "no fence", "fence too early", "fence of a lane", "no syncwarp", "scale of block 0"],
)
def test_what_only_a_gpu_would_show_is_named(broken, old, new, message):
    """An illegal instruction, or values that are wrong now and then."""
    code, output = broken("gemm/fp8_sm90.cu", old, new, f"{__file__}::test_matmul[block_128x128-400-128-1424]")
    assert code == 1, output
    assert message in output

"""Backward passes of csrc that write FP8 or take the amax, run on the host: bit for bit what plain ones and `quantize`
give.
"""

import pytest
import torch

from engine.ops.rope import rope_tables
from tests.csrc.test_quantize import bits

ops = torch.ops.triaxis
HOSTILE = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -3e38, 3e38, 5e-39, 448.0, 57344.0]


def hostile(*shape, dtype, seed=0):
    """Random values of many magnitudes, some of them no numbers, too large or too small, and rows of zeros."""
    torch.manual_seed(seed)
    x = (torch.randn(shape) * torch.logspace(-8, 3, shape[-1])).to(dtype)
    flat = x.view(-1)
    where = torch.randint(0, len(flat), (4 * len(HOSTILE),))
    flat[where] = torch.tensor(HOSTILE).repeat(4).to(dtype)
    x[16:32] = 0
    return x


def assert_as_quantized(fused, plain, arguments, scaling):
    """The fused operator's values, transpose, scales and amax are those of the plain one and `quantize`."""
    scale = torch.tensor([20.0]) if scaling == "tensorwise" else None
    dtype = torch.float8_e5m2 if scaling == "tensorwise" else torch.float8_e4m3fn
    amax = [torch.tensor([0.1]), torch.tensor([0.1])] if scaling == "tensorwise" else [None, None]
    gradient = plain(*arguments).flatten(1)
    expected = ops.quantize(gradient, dtype, scaling, True, True, scale, amax[0], True)
    got = fused(*arguments, scaling, scale, amax[1])
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert torch.equal(bits(a), bits(b))
    if scaling == "tensorwise":
        assert torch.equal(bits(amax[0]), bits(amax[1]))
    return gradient


def gate_up_and_grad(rows, columns, dtype, values=torch.randn):
    """With rows that are parts of longer ones."""
    gate_up = values(rows, 2 * columns + 8).to(dtype)[:, : 2 * columns]
    return values(rows, columns + 8).to(dtype)[:, :columns], gate_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [16, 128, 144])
@pytest.mark.parametrize("scaling, columns", [("tensorwise", 8), ("tensorwise", 200), ("tensorwise", 256),
                                              ("block_1x128", 128), ("block_1x128", 384)])  # fmt: skip
def test_swiglu(emulated, rows, scaling, columns, dtype):
    torch.manual_seed(columns)
    emulated(rows)
    arguments = gate_up_and_grad(rows, columns, dtype)
    assert_as_quantized(ops.swiglu_backward_fp8, ops.swiglu_backward, arguments, scaling)


@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
def test_swiglu_of_hostile_values(emulated, scaling):
    grad, gate_up = (hostile(144, columns, dtype=torch.bfloat16) for columns in (256, 512))
    gradient = assert_as_quantized(ops.swiglu_backward_fp8, ops.swiglu_backward, (grad, gate_up), scaling)
    assert gradient.isnan().any()
    assert gradient.isinf().any()


def heads_and_tables(tokens, heads, kv_heads, size, dtype, values=torch.randn):
    """Gradients of q as attention hands it over, of k, and of v as a part of something wider."""
    q = values(heads, tokens, size).to(dtype).transpose(0, 1)
    k, v = values(tokens, kv_heads, size).to(dtype), values(tokens, 2 * kv_heads, size).to(dtype)[:, kv_heads:]
    return q, k, v, *rope_tables(torch.arange(tokens) + 100, size, 10_000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [16, 144])
@pytest.mark.parametrize("heads, kv_heads, size", [(3, 1, 16), (5, 1, 32), (4, 2, 64), (6, 2, 128)])
@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
def test_rope(emulated, scaling, heads, kv_heads, size, tokens, dtype):
    torch.manual_seed(size)
    emulated(tokens)
    arguments = heads_and_tables(tokens, heads, kv_heads, size, dtype)
    assert_as_quantized(ops.rope_qk_backward_fp8, ops.rope_qk_backward, arguments, scaling)


@pytest.mark.parametrize("scaling", ["tensorwise", "block_1x128"])
def test_rope_of_hostile_values(emulated, scaling):
    arguments = heads_and_tables(144, 4, 2, 128, torch.bfloat16, lambda *shape: hostile(*shape, dtype=torch.bfloat16))
    gradient = assert_as_quantized(ops.rope_qk_backward_fp8, ops.rope_qk_backward, arguments, scaling)
    assert gradient.isnan().any()
    assert gradient.isinf().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 77), (70, 1376)])
def test_swiglu_takes_the_amax(emulated, rows, columns, dtype):
    torch.manual_seed(columns)
    amax = torch.zeros(1)
    grad = ops.swiglu_backward_amax(*gate_up_and_grad(rows, columns, dtype), amax)
    assert amax.item() == grad.abs().max().item()


@pytest.mark.parametrize("size", [6, 32, 256])
def test_rope_takes_the_amax(emulated, size):
    torch.manual_seed(size)
    arguments = heads_and_tables(37, 4, 2, size, torch.bfloat16)
    for largest in range(3):  # in q, k or v
        amax = torch.zeros(1)
        arguments[largest][5, 1, 3] = 1000 * (largest + 1)
        grad = ops.rope_qk_backward_amax(*arguments, amax)
        assert amax.item() == grad.abs().max().item() > 900 * (largest + 1)


def test_an_amax_shows_what_is_no_number(emulated):
    for value in (torch.inf, torch.nan):
        amax, (grad, gate_up) = torch.zeros(1), gate_up_and_grad(5, 64, torch.bfloat16)
        grad[3, 7] = value
        ops.swiglu_backward_amax(grad, gate_up, amax)
        assert not amax.isfinite()


def test_wrong_arguments_are_named(emulated):
    grad, gate_up = torch.randn(16, 64), torch.randn(16, 128)
    with pytest.raises(RuntimeError, match="'tensorwise' with a scale"):
        ops.swiglu_backward_fp8(grad, gate_up, "tensorwise", None, None)
    with pytest.raises(RuntimeError, match="FP8 takes multiples of 16"):
        ops.swiglu_backward_fp8(grad[:3], gate_up[:3], "tensorwise", torch.ones(1), None)
    with pytest.raises(RuntimeError, match="swiglu_backward_fp8: invalid argument"):  # a block of both gradients
        ops.swiglu_backward_fp8(grad, gate_up, "block_1x128", None, None)
    heads = heads_and_tables(16, 2, 1, 48, torch.float32)
    with pytest.raises(RuntimeError, match="rope_qk_backward_fp8: invalid argument"):
        ops.rope_qk_backward_fp8(*heads, "block_1x128", None, None)


def test_a_missing_barrier_shows(broken):
    """Between the two tiles of a block, which share its memory."""
    barrier = "  __syncthreads();  // all have read the shared memory\n"
    code, output = broken("kernels/swiglu.cu", barrier, "", f"{__file__}::test_swiglu")
    assert code == 1, output

"""csrc/kernels/norm.cu, run on the host, against plain arithmetic in float64."""

import itertools

import pytest
import torch
from torch import Tensor

ops = torch.ops.triaxis
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TUNED = [64, 128, 256, 1024, 2048, 3584, 4096, 5120, 8192]
GENERAL = [1, 33, 100, 1000, 4100 + 1, 16384 + 8]
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """Random values whose mean is not 0; `gap`: elements between rows."""
    wide = torch.randn(*shape[:-1], shape[-1] + gap) + 0.5
    return wide.to(dtype)[..., : shape[-1]]


def reference(x, residual, weight, bias, *, centered):
    """(y, what was normalized), differentiable, in float64; only the sum with the residual is rounded."""
    dtype, wide = x.dtype, x.double()
    if residual is not None:
        wide = wide + residual.double()
        wide = wide + (wide.to(dtype).double() - wide).detach()  # rounded, and the gradient goes through
    mean = wide.mean(-1, keepdim=True) if centered else 0
    y = (wide - mean) / ((wide - mean).square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return (y if bias is None else y + bias.double()), wide


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {torch.float32: {"rtol": 5e-6, "atol": 5e-6}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5}}.get(
        dtype, {"rtol": 2e-3, "atol": 1e-5}
    )


def check(rows, columns, dtype, *, centered, residual=False, bias=False, gap=0):
    """Forward and backward of one case."""
    x = random(rows, columns, dtype=dtype, gap=gap)
    other = random(rows, columns, dtype=dtype, gap=2 * gap) if residual else None
    weight = random(columns, dtype=dtype)
    shift = random(columns, dtype=dtype) if bias else None
    leaves = [t for t in (x, other, weight, shift) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    expected, normalized = reference(x, other, weight, shift, centered=centered)

    detached = [None if t is None else t.detach() for t in (x, other, weight, shift)]
    y, total, mean, rstd = ops.norm_forward(*detached, EPS, centered)
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype))
    spread = (normalized - (normalized.mean(-1, keepdim=True) if centered else 0)).square().mean(-1)
    torch.testing.assert_close(rstd.double(), (spread + EPS).rsqrt(), rtol=5e-5, atol=0)
    if centered:
        torch.testing.assert_close(mean.double(), normalized.mean(-1), rtol=5e-5, atol=1e-6)
    if residual:
        assert torch.equal(total.double(), normalized.detach())

    grad = random(rows, columns, dtype=dtype, gap=gap)
    grad_sum = random(rows, columns, dtype=dtype) if residual else None
    wanted = (expected * grad.double()).sum() + (0 if grad_sum is None else (normalized * grad_sum.double()).sum())
    wanted.backward()
    saved = total if residual else detached[0]
    grad_x, grad_weight, grad_bias = ops.norm_backward(grad, grad_sum, saved, detached[2], mean, rstd, centered)
    rounding = torch.finfo(dtype).eps
    loose = 2 * rounding
    scale = (grad.double() * weight.detach().double()).abs().mean().item() * rstd.max().item()  # before it cancels
    torch.testing.assert_close(grad_x.double(), x.grad.double(), rtol=loose, atol=(loose + 5e-6) * scale)
    if residual:
        assert torch.equal(other.grad, x.grad)
    for got, leaf in ((grad_weight, weight), *([(grad_bias, shift)] if bias else [])):
        exact = leaf.grad.double()
        bound = exact.abs().max().item() * (
            rounding + 1e-6
        )  # the reference's gradient is rounded to the weight's dtype
        assert got.dtype == torch.float32
        assert (got.double() - exact).abs().max() <= 2 * bound + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", TUNED + GENERAL)
def test_sizes(emulated, columns, dtype):
    torch.manual_seed(columns)
    for seed, centered in enumerate((False, True)):
        emulated(seed)
        check(5, columns, dtype, centered=centered, residual=centered)


OPTIONS = [
    dict(zip(("centered", "residual", "bias"), values, strict=True))
    for values in itertools.product((False, True), repeat=3)
    if values[0] or not values[2]
]


WIDTHS = {"a row a warp": 128, "a row a block": 520, "two vectors a thread in fp32": 4000, "general": 77}


@pytest.mark.parametrize("columns", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(name for name in o if o[name]) or "plain")
def test_options(emulated, options, columns):
    torch.manual_seed(1)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        emulated(seed)
        check(13, columns, dtype, gap=8 if columns % 8 == 0 else 3, **options)


@pytest.mark.parametrize("rows, columns", [*itertools.product((0, 1, 2, 3, 16, 17, 300), (128, 520, 77)), (4096, 64)])
def test_rows(emulated, rows, columns):
    torch.manual_seed(rows)
    if rows:
        check(rows, columns, torch.float32, centered=True, residual=True, bias=True)
        return
    x, weight = torch.empty(0, columns), torch.randn(columns)
    y, _, _, rstd = ops.norm_forward(x, None, weight, None, EPS, False)
    assert y.shape == (0, columns)
    grad_x, grad_weight, _ = ops.norm_backward(x, None, x, weight, x.new_empty(0), rstd, False)
    assert grad_x.shape == (0, columns)
    assert torch.equal(grad_weight, torch.zeros(columns))


@pytest.mark.parametrize("columns", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("centered", [False, True])
def test_gradients_are_added_to_those_given(emulated, centered, columns):
    """Or overwrite them; bitwise what adding the gradients returned gives, at any alignment."""
    torch.manual_seed(0)
    x, grad, weight = torch.randn(13, columns), torch.randn(13, columns), torch.randn(columns)
    mean, rstd = torch.randn(13 if centered else 0), torch.rand(13)
    expected = ops.norm_backward(grad, None, x, weight, mean, rstd, centered)
    for accumulate in (False, True):
        around = [torch.full((columns + 2,), 3.0 if accumulate else torch.nan) for _ in range(1 + centered)]
        given = [t[1:-1] for t in around]
        got = ops.norm_backward(grad, None, x, weight, mean, rstd, centered, accumulate, *given)
        assert torch.equal(got[0], expected[0])
        assert got[1].numel() == got[2].numel() == 0
        for whole, out, sums in zip(around, given, expected[1:], strict=False):
            assert torch.equal(out, sums + 3.0 if accumulate else sums)
            assert not (whole[[0, -1]] != 3.0).any() if accumulate else whole[[0, -1]].isnan().all()


def test_the_same_numbers_every_time(emulated):
    """Sums have one order, whatever the order in which warps run."""
    torch.manual_seed(3)
    x, weight, grad = torch.randn(33, 1032), torch.randn(1032), torch.randn(33, 1032)
    results = []
    for seed in range(4):
        emulated(seed)
        y, _, mean, rstd = ops.norm_forward(x, None, weight, None, EPS, True)
        gradients = ops.norm_backward(grad, None, x, weight, mean, rstd, True)
        results.append((y, mean, rstd, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_not_a_number_stays_in_its_row(emulated):
    x = torch.randn(4, 520)
    x[2, 17] = torch.nan
    y, *_ = ops.norm_forward(x, None, torch.ones(520), None, EPS, False)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("centered", [False, True])
def test_not_a_number_stays_in_its_row_of_the_gradient(emulated, centered):
    """Also in the last vector, which threads beyond the end of the row load as well."""
    grad, x, statistics = torch.randn(4, 520), torch.randn(4, 520), torch.ones(4)
    grad[2, 519] = torch.nan
    mean = statistics if centered else statistics[:0]
    grad_x, grad_weight, _ = ops.norm_backward(grad, None, x, torch.ones(520), mean, statistics, centered)
    assert grad_x[2].isnan().all()
    assert grad_x[[0, 1, 3]].isfinite().all()
    assert grad_weight.isnan().nonzero().flatten().tolist() == [519]


def test_wrong_arguments_are_named(emulated):
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(RuntimeError, match="weight: wrong dtype"):
        ops.norm_forward(x, None, weight.bfloat16(), None, EPS, False)
    with pytest.raises(RuntimeError, match="weight: expected a dense vector of 8"):
        ops.norm_forward(x, None, weight[:4], None, EPS, False)
    with pytest.raises(RuntimeError, match=r"residual: expected the shape of the other matrices, \[4, 8\]"):
        ops.norm_forward(x, x[:2], weight, None, EPS, False)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        ops.norm_forward(x.double(), None, weight.double(), None, EPS, False)
    backward = (x, None, x, weight, weight[:0], torch.ones(4), False)
    with pytest.raises(RuntimeError, match="accumulate: there is no grad_weight"):
        ops.norm_backward(*backward, True)
    with pytest.raises(RuntimeError, match="grad_bias: a centered norm has one"):
        ops.norm_backward(*backward, True, weight, weight)
    with pytest.raises(RuntimeError, match="grad_weight: wrong dtype"):
        ops.norm_backward(*backward, True, weight.bfloat16())


BARRIERS = {
    "the sum over a block": ("common/reduce.cuh", "    __syncthreads();\n"),
    "shares of the weight's gradient": ("kernels/norm.cu", "  __syncthreads();\n  const int which"),
}


@pytest.mark.parametrize("place", BARRIERS)
def test_a_missing_barrier_shows(broken, place):
    file, line = BARRIERS[place]
    code, output = broken(file, line, line.replace("__syncthreads();", ""), f"{__file__}::test_options")
    assert code == 1, output

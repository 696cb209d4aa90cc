"""Cross-entropy, AdamW and the gradient norm of csrc, run on the host."""

import pytest
import torch

from engine.ops.adamw import adamw_step_reference

ops = torch.ops.triaxis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 77), (3, 4096), (2, 20_000), (0, 16)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_in_two_parts_of_the_vocabulary(emulated, rows, columns, z_loss, dtype):
    torch.manual_seed(columns)
    emulated(rows)
    logits = (4 * torch.randn(rows, 2 * columns)).to(dtype)
    labels = torch.randint(0, 2 * columns, (rows,))
    scale = torch.rand(rows)
    wide = logits.double().requires_grad_()
    z = wide.logsumexp(-1)
    losses = z - wide.gather(1, labels[:, None])[:, 0] + z_loss * z.square()
    (losses * scale.double()).sum().backward()

    parts = [(logits[:, :columns].contiguous(), 0), (logits[:, columns:].contiguous(), columns)]
    statistics = [ops.cross_entropy_statistics(part, labels, first) for part, first in parts]
    total = torch.logsumexp(torch.stack([own for own, _ in statistics]), 0)
    at_label = sum(mine for _, mine in statistics)
    torch.testing.assert_close(total.double(), z.detach(), rtol=1e-5, atol=1e-6)
    got = total - at_label + z_loss * total.square()
    torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-5, atol=2e-5)
    for part, first in parts:
        ops.cross_entropy_gradient_(part, labels, total, scale, first, z_loss)
    gradient = torch.cat([part for part, _ in parts], 1).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, wide.grad, rtol=eps + 2e-5, atol=1e-6)


def test_logits_that_are_no_numbers(emulated):
    logits = torch.randn(3, 600)
    logits[0, 5], logits[1, 7] = torch.nan, -torch.inf
    z, _ = ops.cross_entropy_statistics(logits, torch.zeros(3, dtype=torch.long), 0)
    assert z[0].isnan()
    torch.testing.assert_close(z[1:], logits[1:].logsumexp(-1))


@pytest.mark.parametrize("size", [0, 1, 3, 1024, 5003])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, None], ids=str)
def test_adamw(emulated, size, offset, moments, param_dtype):
    torch.manual_seed(size)
    master, grad = torch.randn(size + offset)[offset:], torch.randn(size)
    exp_avg, exp_avg_sq = torch.randn(size).to(moments), torch.rand(size).to(moments)
    param = None if param_dtype is None else torch.zeros(size, dtype=param_dtype)
    step, scale = torch.tensor([3.0]), torch.tensor([0.25])
    expected = [x.to(torch.float32, copy=True) for x in (master, exp_avg, exp_avg_sq)]
    adamw_step_reference(expected[0], grad / scale, expected[1], expected[2], step, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    settings = (1e-2, 0.9, 0.95, 1e-8, 0.1)
    skip = torch.ones(1)
    before = master.clone(), exp_avg.clone(), exp_avg_sq.clone()
    ops.adamw_(master, grad, exp_avg, exp_avg_sq, param, step, scale, skip, *settings)
    assert all(torch.equal(a, b) for a, b in zip(before, (master, exp_avg, exp_avg_sq), strict=True))
    ops.adamw_(master, grad, exp_avg, exp_avg_sq, param, step, scale, skip * 0, *settings)
    torch.testing.assert_close(master, expected[0], rtol=2e-5, atol=1e-6)
    rounding = {"rtol": max(torch.finfo(moments).eps, 1e-6), "atol": 1e-6}
    torch.testing.assert_close(exp_avg.float(), expected[1], **rounding)
    torch.testing.assert_close(exp_avg_sq.float(), expected[2], **rounding)
    if param is not None:
        assert torch.equal(param, master.to(param_dtype))


@pytest.mark.parametrize("size", [0, 1, 5, 4096, 100_003])
def test_square_sum(emulated, size):
    torch.manual_seed(size)
    x = torch.randn(size)
    for part in (x, x[1:]):
        torch.testing.assert_close(ops.square_sum([part]).double(), part.double().square().sum(), rtol=1e-6, atol=1e-7)
    results = {(emulated(seed), ops.square_sum([x, x[1:]]).item())[1] for seed in range(3)}
    assert len(results) == 1


@pytest.mark.parametrize("count", [2, 240, 241, 500])
def test_square_sum_of_pieces(emulated, launched, count):
    """240 of them in a launch; of any size and alignment."""
    torch.manual_seed(count)
    sizes = torch.randint(0, 300, (count - 1,)).tolist()
    pieces = torch.randn(sum(sizes) + 9000).split((*sizes, 9000))
    before = launched()
    total = ops.square_sum(pieces)
    assert launched() - before == -(-count // 240) + 1
    torch.testing.assert_close(total.double(), torch.cat(pieces).double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_square_sum_shows_what_is_not_finite(emulated, value):
    x = torch.randn(5000)
    x[4321] = value
    assert not ops.square_sum([x, x[:8]]).isfinite()


def test_wrong_arguments_are_named(emulated):
    x, one = torch.randn(8), torch.ones(1)
    with pytest.raises(RuntimeError, match="logits: expected a dense matrix"):
        ops.cross_entropy_statistics(torch.randn(4, 8).t(), torch.zeros(8, dtype=torch.long), 0)
    with pytest.raises(RuntimeError, match="grad: wrong dtype"):
        ops.adamw_(x, x.bfloat16(), x, x, None, one, None, None, 1.0, 0.9, 0.9, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="step: expected one fp32 element"):
        ops.adamw_(x, x, x, x, None, x, None, None, 1.0, 0.9, 0.9, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="pieces: wrong dtype"):
        ops.square_sum([x, x.bfloat16()])

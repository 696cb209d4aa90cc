import pytest
import torch

from engine.ops.adamw import adamw_step, adamw_step_reference

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def state(size: int) -> list[torch.Tensor]:
    torch.manual_seed(size)
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, size)
    return [param, grad, exp_avg, exp_avg_sq.abs()]


@pytest.mark.parametrize("size", [0, 1, 17, 100_003])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_equals_its_reference(size, scale, found_inf):
    flags = {
        "grad_scale": None if scale is None else torch.tensor([scale]),
        "found_inf": None if found_inf is None else torch.tensor([found_inf]),
    }
    fast, reference = state(size), state(size)
    for count in (1.0, 2.0, 1000.0):
        step = torch.tensor([count])
        fast[1], reference[1] = state(size)[1], state(size)[1]
        adamw_step(*fast, step, **OPTIONS, **flags)
        adamw_step_reference(*reference, step, **OPTIONS, **flags)
        assert step == count
    for got, expected in zip((fast[0], *fast[2:]), (reference[0], *reference[2:]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_equals_torch_optim():
    param, grad, exp_avg, exp_avg_sq = state(50)
    exp_avg.zero_(), exp_avg_sq.zero_()
    theirs = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], **OPTIONS)
    for step in range(1, 5):
        theirs.grad = grad * step
        optimizer.step()
        adamw_step(param, grad * step, exp_avg, exp_avg_sq, torch.tensor([float(step)]), **OPTIONS)
    torch.testing.assert_close(param, theirs.detach())


def test_a_skipped_step_changes_nothing():
    before, after = state(100), state(100)
    after[1] = after[1].fill_(torch.nan)
    adamw_step(*after, torch.tensor([3.0]), **OPTIONS, found_inf=torch.tensor([1.0]))
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])


def test_parts_of_a_flat_tensor():
    whole, parts = state(1000), state(1000)
    adamw_step(*whole, torch.tensor([3.0]), **OPTIONS)
    for part in (slice(0, 128), slice(128, 1000)):
        adamw_step(*(x[part] for x in parts), torch.tensor([3.0]), **OPTIONS)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=1e-7)

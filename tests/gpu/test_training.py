"""Cross-entropy, AdamW and the gradient norm of csrc on a GPU."""

import pytest
import torch

from engine.ops.adamw import adamw_step_reference
from engine.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.csrc.test_training import (  # noqa: F401
    test_adamw,
    test_cross_entropy_in_two_parts_of_the_vocabulary,
    test_logits_that_are_no_numbers,
    test_square_sum,
    test_square_sum_shows_what_is_not_finite,
    test_wrong_arguments_are_named,
)

ops = torch.ops.triaxis
MORE_THAN_32_BITS = 2**32 + 4096 + 5


@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_cross_entropy_at_the_size_of_a_7b(emulated, vocabulary):
    torch.manual_seed(0)
    logits = (4 * torch.randn(2048, vocabulary)).bfloat16()
    labels, scale = torch.randint(0, vocabulary, (2048,)), torch.rand(2048)
    wide = logits.float().requires_grad_()
    losses = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (losses * scale).sum().backward()
    z, at_label = ops.cross_entropy_statistics(logits, labels, 0)
    torch.testing.assert_close(z - at_label, losses.detach(), rtol=1e-5, atol=2e-5)
    ops.cross_entropy_gradient_(logits, labels, z, scale, 0, 0.0)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(logits.float(), wide.grad, rtol=eps + 2e-5, atol=1e-6)


def test_projection_and_loss_in_chunks(emulated):
    """2^28 logits at a time: three chunks of this one, with rows that do not count."""
    torch.manual_seed(0)
    hidden = torch.randn(20_000, 256, dtype=torch.bfloat16)
    weight = torch.randn(32_000, 256, dtype=torch.bfloat16) / 16
    labels, mask = torch.randint(0, 32_000, (20_000,)), (torch.rand(20_000) < 0.9).float()
    found = []
    for function, dtype in ((linear_cross_entropy, torch.bfloat16), (linear_cross_entropy_reference, torch.float32)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves, labels, mask, z_loss=1e-4)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad.float() for leaf in leaves)])
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() < 1e-2 * expected.norm()


def test_more_elements_than_32_bits_count(emulated):
    needed = 16 * MORE_THAN_32_BITS + 2**32
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    torch.manual_seed(0)
    master, grad = torch.randn(MORE_THAN_32_BITS), torch.randn(MORE_THAN_32_BITS)
    exp_avg, exp_avg_sq = (torch.zeros(MORE_THAN_32_BITS, dtype=torch.bfloat16) for _ in range(2))
    param = torch.zeros(MORE_THAN_32_BITS, dtype=torch.bfloat16)
    ends = [slice(0, 4096), slice(2**31 - 2048, 2**31 + 2048), slice(2**32 - 2048, MORE_THAN_32_BITS)]
    state = (master, grad, exp_avg, exp_avg_sq)
    before = [[x[end].to(torch.float32, copy=True) for x in state] for end in ends]  # .float() of fp32 is a view
    ones = torch.ones(1)
    ops.adamw_(master, grad, exp_avg, exp_avg_sq, param, ones, None, None, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    for end, old in zip(ends, before, strict=True):
        adamw_step_reference(*old, ones, 1e-2, (0.9, 0.95), 1e-8, 0.1)
        torch.testing.assert_close(master[end], old[0], rtol=2e-5, atol=1e-6)
        assert torch.equal(param[end], master[end].bfloat16())
    expected = sum(part.double().square().sum() for part in grad.split(2**28))
    torch.testing.assert_close(ops.square_sum([grad]).double(), expected, rtol=1e-6, atol=0)

import pytest
import torch

from engine.ops.grad_norm import square_sum, square_sum_reference


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000, 1 << 24])
def test_long_vectors_are_summed_to_seven_digits(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(square_sum([x]), square_sum_reference(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [5, 9000])
def test_what_is_not_finite_stays_so(value, place):
    x = torch.zeros(9001)
    x[place] = value
    assert not torch.isfinite(square_sum([x]))


def test_pieces_add_up():
    pieces = torch.randn(10_000, dtype=torch.float32).split((3, 0, 9_000, 997))
    torch.testing.assert_close(square_sum(pieces), square_sum_reference(torch.cat(pieces)), rtol=1e-6, atol=0)

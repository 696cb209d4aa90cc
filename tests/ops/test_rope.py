import math

import pytest
import torch

from engine.config.schema import RopeScaling
from engine.ops.rope import apply_rope, apply_rope_qkv, apply_rope_reference, rope_tables
from tests.ops.op_parity import FP32, assert_same, strided

LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 2), (13, 3, 10), (64, 4, 64), (0, 2, 8)])
def test_equals_its_reference(tokens, heads, size):
    torch.manual_seed(0)
    cos, sin = rope_tables(torch.arange(tokens), size, 1e4)
    ops = (lambda x: apply_rope(x, cos, sin), lambda x: apply_rope_reference(x, cos, sin))
    assert_same(*ops, [torch.randn(tokens, heads, size)], strided(tokens, heads, size), **FP32)
    x = strided(tokens, heads, size)
    torch.testing.assert_close(apply_rope(x, cos, sin), apply_rope_reference(x, cos, sin), rtol=5e-6, atol=1e-6)


def test_rotates_pairs_half_a_head_apart():
    cos, sin = rope_tables(torch.tensor([0, 5]), 8, 100.0)
    x = torch.randn(2, 1, 8)
    out = apply_rope(x, cos, sin)
    torch.testing.assert_close(out[0], x[0])
    for i in range(4):
        rotated = torch.complex(x[1, 0, i], x[1, 0, i + 4]) * complex(
            math.cos(5 * 100 ** (-i / 4)), math.sin(5 * 100 ** (-i / 4))
        )
        torch.testing.assert_close(torch.complex(out[1, 0, i], out[1, 0, i + 4]), rotated)


def test_gradients_in_double():
    tables = [table.double() for table in rope_tables(torch.tensor([3, 1, 4]), 6, 1e4)]
    x = torch.randn(3, 2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *tables), (x,))


def test_bf16_is_rotated_in_fp32():
    torch.manual_seed(0)
    cos, sin = rope_tables(torch.arange(32) * 1000, 16, 1e4)
    x = torch.randn(32, 2, 16).bfloat16()
    out = apply_rope(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope_reference(x.float(), cos, sin).bfloat16())


def test_llama3_scaling_slows_low_frequencies_alone():
    one = torch.tensor([1])
    plain, scaled = (
        torch.atan2(sin, cos)[0] for cos, sin in (rope_tables(one, 128, 5e5), rope_tables(one, 128, 5e5, LLAMA31))
    )
    wavelength = 2 * math.pi / plain
    high, low = wavelength < 8192 / 4, wavelength > 8192
    torch.testing.assert_close(scaled[high], plain[high], rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled[low], plain[low] / 8, rtol=1e-6, atol=0)
    between = ~high & ~low
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_never_waits_for_the_device():
    cos, sin = rope_tables(torch.arange(8, device="meta"), 16, 1e4, LLAMA31)
    assert apply_rope(torch.randn(8, 2, 16, device="meta"), cos, sin).shape == (8, 2, 16)


def test_longrope_of_each_document_is_that_of_its_length():
    scaling = RopeScaling(
        rope_type="longrope", short_factor=(1.0, 2.0), long_factor=(3.0, 4.0), original_max_position=4, factor=4.0
    )
    together = rope_tables(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0]), 4, 1e4, scaling)
    for places, factors in ((slice(0, 4), (1.0, 2.0)), (slice(4, 9), (3.0, 4.0)), (slice(9, 10), (1.0, 2.0))):
        angles = torch.arange(places.stop - places.start)[:, None] * torch.tensor([1.0, 0.01]) / torch.tensor(factors)
        torch.testing.assert_close(together[0][places], angles.cos() * 2**0.5)
        torch.testing.assert_close(together[1][places], angles.sin() * 2**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_each_head_is_not_rotated(dtype):
    qkv = torch.randn(5, 4, 8).to(dtype)
    cos, sin = rope_tables(torch.arange(5), 6, 1e4)
    q, k, v = apply_rope_qkv(qkv, cos, sin, 1)
    assert torch.equal(q, torch.cat((apply_rope(qkv[:, :2, :6], cos, sin), qkv[:, :2, 6:]), -1))
    assert torch.equal(k, torch.cat((apply_rope(qkv[:, 2:3, :6], cos, sin), qkv[:, 2:3, 6:]), -1))
    assert torch.equal(v, qkv[:, 3:])

"""SwiGLU and rotary positions of csrc, run on the host, against plain arithmetic in float64."""

import pytest
import torch
import torch.nn.functional as F

from engine.ops.rope import rope_tables

ops = torch.ops.triaxis
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got, expected, dtype):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected.double(), rtol=eps + 1e-6, atol=eps * 1e-2 + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("columns", [1, 8, 77, 1000, 1376])
def test_swiglu(emulated, rows, columns, dtype):
    torch.manual_seed(columns)
    emulated(rows)
    gate_up = torch.randn(rows, 2 * columns + 8).to(dtype)[:, : 2 * columns].requires_grad_()
    grad = torch.randn(rows, columns + 8).to(dtype)[:, :columns]
    wide = gate_up.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(grad.double())
    close(ops.swiglu_forward(gate_up.detach()), expected.detach(), dtype)
    close(ops.swiglu_backward(grad, gate_up.detach()), wide.grad, dtype)


def test_swiglu_far_from_zero(emulated):
    gate_up = torch.tensor([[-200.0, 200.0, -90.0, 3.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(ops.swiglu_forward(gate_up)[0, :2], torch.tensor([-0.0, 200.0]))
    assert ops.swiglu_backward(torch.ones(1, 4), gate_up).isfinite().all()


def rotated(x, cos, sin):
    first, second = x.double().chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 128), (8, 2, 64), (3, 1, 6), (32, 8, 16), (1, 1, 256)])
def test_rope(emulated, heads, kv_heads, size, dtype):
    torch.manual_seed(size)
    tokens = 7
    cos, sin = rope_tables(torch.arange(tokens) + 100, size, 10_000.0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, size).to(dtype)
    q, k = ops.rope_qk(qkv, cos, sin, kv_heads)
    close(q, rotated(qkv[:, :heads], cos, sin), dtype)
    close(k, rotated(qkv[:, heads : heads + kv_heads], cos, sin), dtype)
    close(ops.rope(qkv[:, heads:], cos, sin, False), rotated(qkv[:, heads:], cos, sin), dtype)

    grad_q, grad_k, grad_v = torch.randn_like(q), torch.randn_like(k), torch.randn_like(k)
    spread = grad_q.transpose(0, 1).contiguous().transpose(0, 1)  # as attention hands it over
    grad = ops.rope_qk_backward(spread, grad_k, grad_v, cos, sin)
    expected = (rotated(grad_q, cos, -sin), rotated(grad_k, cos, -sin), grad_v.double())
    close(grad, torch.cat(expected, 1), dtype)
    close(ops.rope(grad_q, cos, sin, True), expected[0], dtype)


def test_rope_of_nothing(emulated):
    cos, sin = rope_tables(torch.arange(0), 8, 10_000.0)
    assert ops.rope(torch.empty(0, 3, 8), cos, sin, False).shape == (0, 3, 8)


def test_wrong_arguments_are_named(emulated):
    with pytest.raises(RuntimeError, match="gate_up: expected a matrix of an even width"):
        ops.swiglu_forward(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="grad_out: expected half the width"):
        ops.swiglu_backward(torch.randn(2, 3), torch.randn(2, 4))
    cos, sin = rope_tables(torch.arange(2), 8, 10_000.0)
    with pytest.raises(RuntimeError, match=r"expected heads .* of an even size"):
        ops.rope(torch.randn(2, 1, 7), cos, sin, False)
    with pytest.raises(RuntimeError, match="expected dense tables"):
        ops.rope(torch.randn(3, 1, 8), cos, sin, False)

"""SwiGLU and rotary positions of csrc on a GPU."""

import torch
import torch.nn.functional as F

from engine.ops.rope import rope_tables
from tests.csrc.test_elementwise import (  # noqa: F401
    close,
    rotated,
    test_rope,
    test_rope_of_nothing,
    test_swiglu,
    test_swiglu_far_from_zero,
    test_wrong_arguments_are_named,
)

ops = torch.ops.triaxis


def test_swiglu_at_the_size_of_a_7b(emulated):
    torch.manual_seed(0)
    gate_up = torch.randn(8192, 2 * 11008, dtype=torch.bfloat16)
    grad = torch.randn(8192, 11008, dtype=torch.bfloat16)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(grad.double())
    close(ops.swiglu_forward(gate_up), expected.detach(), torch.bfloat16)
    close(ops.swiglu_backward(grad, gate_up), wide.grad, torch.bfloat16)


def test_rope_at_the_size_of_a_7b(emulated):
    torch.manual_seed(0)
    cos, sin = rope_tables(torch.arange(8192), 128, 10_000.0)
    qkv = torch.randn(8192, 3 * 32, 128, dtype=torch.bfloat16)
    q, k = ops.rope_qk(qkv, cos, sin, 32)
    close(q, rotated(qkv[:, :32], cos, sin), torch.bfloat16)
    close(k, rotated(qkv[:, 32:64], cos, sin), torch.bfloat16)
    back = ops.rope_qk_backward(q, k, qkv[:, 64:], cos, sin)
    assert torch.equal(back[:, 64:], qkv[:, 64:])
    close(back[:, :32], rotated(q, cos, -sin), torch.bfloat16)

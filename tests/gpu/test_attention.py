"""Attention on a GPU, against one masked softmax in fp32."""

import pytest
import torch

from engine.ops.attention import attention, attention_reference
from engine.ops.choice import installed

LENGTHS = {
    "one": (0, 512),
    "equal": (0, 128, 256, 384, 512),
    "documents": (0, 100, 101, 356, 500, 512),
    "an empty one": (0, 0, 200, 512),
}


def qkv(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, size, device="cuda").to(dtype) for n in (heads, kv_heads, kv_heads)]


def with_gradients(function, inputs, grad):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [x.float() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


IMPLS = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("varlen", torch.bfloat16)]
IMPLS += [(package, torch.bfloat16) for package in ("flash_attn", "te") if installed(package)]


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 128), (8, 2, 64), (4, 1, 16)])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_one_masked_softmax(name, window, heads, kv_heads, size, impl, dtype):
    cu_seqlens = LENGTHS[name]
    inputs = qkv(cu_seqlens[-1], heads, kv_heads, size, dtype)
    grad = torch.randn_like(inputs[0])
    got = with_gradients(lambda *given: attention(*given, cu_seqlens, window, impl), inputs, grad)
    wide = [x.float() for x in inputs]
    expected = with_gradients(lambda *given: attention_reference(*given, cu_seqlens, window), wide, grad)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-3) * b.norm()


@pytest.mark.parametrize("window", [None, 64])
def test_the_future_and_other_documents_are_not_seen(window):
    inputs = qkv(512, 4, 4, 128, torch.bfloat16)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:128], x[300:] = torch.nan, 9.0
    both = [attention(*given, (0, 128, 512), window)[128:300] for given in (inputs, changed)]
    assert torch.equal(*both)


def test_no_tokens():
    inputs = [x.requires_grad_() for x in qkv(0, 4, 4, 16, torch.bfloat16)]
    attention(*inputs, (0, 0)).sum().backward()
    assert inputs[0].grad.shape == (0, 4, 16)

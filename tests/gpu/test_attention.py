"""Attention on a GPU, against one masked softmax in fp32: PyTorch's implementations, and those that are installed."""

import warnings

import pytest
import torch

from engine.ops.attention import attention, attention_reference
from engine.ops.attention_choice import AttentionProblem, measure_attention, possible_impls
from engine.ops.choice import installed
from engine.ops.varlen import why_not

LENGTHS = {
    "one": (0, 512),
    "equal": (0, 128, 256, 384, 512),
    "documents": (0, 100, 101, 356, 500, 512),
    "an empty one": (0, 0, 200, 512),
    "long ones": (0, 1000, 1001, 3500, 4096),
}
PACKAGES = [impl for impl in ("flash_attn", "flash_attn_3", "flash_attn_4", "cudnn", "te") if installed(impl)]


def qkv(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, size, device="cuda").to(dtype) for n in (heads, kv_heads, kv_heads)]


def with_gradients(function, inputs, grad):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [x.float() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


IMPLS = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("varlen", torch.bfloat16)]
IMPLS += [(package, torch.bfloat16) for package in PACKAGES]


def skip_if_unsupported(impl: str, size: int, *, deterministic: bool = False) -> None:
    capability = torch.cuda.get_device_capability()
    if why := why_not(impl, torch.bfloat16, size, capability, deterministic=deterministic):
        pytest.skip(f"{impl} {why}")


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 128), (8, 2, 64), (4, 1, 16)])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_one_masked_softmax(name, window, heads, kv_heads, size, impl, dtype):
    if dtype == torch.bfloat16:
        skip_if_unsupported(impl, size)
    cu_seqlens = LENGTHS[name]
    inputs = qkv(cu_seqlens[-1], heads, kv_heads, size, dtype)
    grad = torch.randn_like(inputs[0])
    got = with_gradients(lambda *given: attention(*given, cu_seqlens, window, impl), inputs, grad)
    wide = [x.float() for x in inputs]
    expected = with_gradients(lambda *given: attention_reference(*given, cu_seqlens, window), wide, grad)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-3) * b.norm()


@pytest.mark.parametrize("impl", ["auto", *PACKAGES])
@pytest.mark.parametrize("window", [None, 64])
def test_the_future_and_other_documents_are_not_seen(window, impl):
    skip_if_unsupported(impl, 128)
    inputs = qkv(512, 4, 4, 128, torch.bfloat16)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:128], x[300:] = torch.nan, 9.0
    both = [attention(*given, (0, 128, 512), window, impl)[128:300] for given in (inputs, changed)]
    assert torch.equal(*both)


@pytest.mark.parametrize("impl", ["sdpa", "varlen", *PACKAGES])
@pytest.mark.parametrize("cu_seqlens", [(0, 2048, 4096), (0, 1000, 1001, 3500, 4096)])
def test_deterministic_algorithms_give_the_same_bits(impl, cu_seqlens):
    skip_if_unsupported(impl, 128, deterministic=True)
    inputs = qkv(4096, 8, 2, 128, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [
            with_gradients(lambda *given: attention(*given, cu_seqlens, None, impl), inputs, grad) for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("cu_seqlens", [(0, 4096), (0, 1000, 1001, 3500, 4096)])
@pytest.mark.parametrize("window", [None, 1024])
def test_measuring_leaves_out_nothing_that_is_installed(cu_seqlens, window):
    """Everything that can run agrees; one that does not, or fails, is named in a warning, which is an error here."""
    problem = AttentionProblem(torch.device("cuda", 0), torch.bfloat16, 32, 32, 128, cu_seqlens, window)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_attention(problem) in possible_impls(problem, torch.cuda.get_device_capability())


def test_no_tokens():
    inputs = [x.requires_grad_() for x in qkv(0, 4, 4, 16, torch.bfloat16)]
    attention(*inputs, (0, 0)).sum().backward()
    assert inputs[0].grad.shape == (0, 4, 16)

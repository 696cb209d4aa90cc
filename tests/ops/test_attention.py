import pytest
import torch

from engine.ops.attention import attention, attention_kind, attention_reference, attention_with_cache, torch_impl
from engine.ops.varlen import Scores
from tests.ops.op_parity import assert_same, strided

TOLERANCE = {"rtol": 5e-4, "atol": 5e-6}
SEGMENTS = [(0, 1), (0, 48), (0, 16, 32, 48), (0, 16, 32, 48, 49, 50, 77), (0, 3, 3, 40)]


def qkv(tokens: int, heads: int = 4, kv_heads: int = 4, size: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, size) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("cu_seqlens", SEGMENTS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 5, 15, 16, 1000])
def test_equals_one_masked_softmax(cu_seqlens, kv_heads, window):
    tokens = cu_seqlens[-1]
    assert_same(
        lambda *qkv: attention(*qkv, cu_seqlens, window),
        lambda *qkv: attention_reference(*qkv, cu_seqlens, window),
        qkv(tokens, kv_heads=kv_heads),
        strided(tokens, 4, 16),
        **TOLERANCE,
    )


@pytest.mark.parametrize("cu_seqlens", [(0, 48), (0, 16, 32, 48, 49, 50, 77)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scores", [Scores(0.7), Scores(None, 0.5), Scores(0.7, 0.5)])
def test_scores_of_other_models(cu_seqlens, window, scores):
    inputs = qkv(cu_seqlens[-1], kv_heads=2)
    assert_same(
        lambda *qkv: attention(*qkv, cu_seqlens, window, scores=scores),
        lambda *qkv: attention_reference(*qkv, cu_seqlens, window, scores),
        inputs,
        strided(cu_seqlens[-1], 4, 16),
        **TOLERANCE,
    )
    plain = attention(*inputs, cu_seqlens, window)
    assert not torch.allclose(attention(*inputs, cu_seqlens, window, scores=scores), plain, atol=1e-3)


def test_limited_scores_by_hand():
    q, k, v = qkv(2, 1, 1, 2)
    weights = torch.softmax(3 * torch.tanh(torch.stack([q[1, 0] @ k[0, 0], q[1, 0] @ k[1, 0]]) * 0.7 / 3), 0)
    expected = weights[0] * v[0, 0] + weights[1] * v[1, 0]
    torch.testing.assert_close(attention_reference(q, k, v, (0, 2), None, Scores(0.7, 3.0))[1, 0], expected)


def test_reference_by_hand():
    q, k, v = qkv(3, 1, 1, 2)
    weights = torch.softmax(torch.stack([q[2, 0] @ k[1, 0], q[2, 0] @ k[2, 0]]) / 2**0.5, 0)
    expected = weights[0] * v[1, 0] + weights[1] * v[2, 0]
    torch.testing.assert_close(attention_reference(q, k, v, (0, 3), 2)[2, 0], expected)
    torch.testing.assert_close(attention_reference(q, k, v, (0, 1, 3))[2, 0], expected)


@pytest.mark.parametrize("cu_seqlens", [(0, 20, 40, 60), (0, 17, 40, 60)])
@pytest.mark.parametrize("window", [None, 4])
def test_a_segment_is_untouched_by_the_others(cu_seqlens, window):
    """Bitwise, forwards and backwards, also where another segment holds NaN."""
    first, last = cu_seqlens[1:3]
    results = []
    for other in (1.0, -3.0, torch.nan):
        inputs = [x.index_fill_(0, torch.arange(first), other).requires_grad_() for x in qkv(60)]
        inputs = [x.detach().index_fill_(0, torch.arange(last, 60), other).requires_grad_() for x in inputs]
        out = attention(*inputs, cu_seqlens, window)
        out[first:last].sum().backward()
        results.append([out[first:last], *(x.grad[first:last] for x in inputs)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_the_future_is_not_seen():
    inputs = qkv(32)
    changed = [x.index_fill(0, torch.arange(20, 32), 9.0) for x in inputs]
    assert torch.equal(attention(*inputs, (0, 32))[:20], attention(*changed, (0, 32))[:20])


def test_gradients_in_double():
    inputs = [x.double().requires_grad_() for x in qkv(7, 2, 1, 4)]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, (0, 3, 7), 2), inputs)


def test_bf16():
    inputs = [x.bfloat16() for x in qkv(48, kv_heads=2)]
    assert_same(
        lambda *qkv: attention(*qkv, (0, 16, 48)),
        lambda *qkv: attention_reference(*qkv, (0, 16, 48)),
        inputs,
        torch.randn(48, 4, 16).bfloat16(),
        rtol=2e-2,
        atol=2e-2,
    )


def test_no_tokens():
    inputs = [x.requires_grad_() for x in qkv(0)]
    attention(*inputs, (0, 0)).sum().backward()
    assert inputs[0].grad.shape == (0, 4, 16)


@pytest.mark.parametrize("new", [1, 2, 13, 40])
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scores", [Scores(), Scores(0.7, 0.5)])
def test_new_tokens_with_a_cache_equal_the_whole(new, window, kv_heads, scores):
    q, k, v = qkv(40, kv_heads=kv_heads)
    whole = attention_reference(q, k, v, (0, 40), window, scores)
    newest = attention_with_cache(q[None, 40 - new :], k[None], v[None], (40,), window, scores)[0]
    torch.testing.assert_close(newest, whole[40 - new :], **TOLERANCE)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sequences_of_a_cache_do_not_see_each_other(new, window, kv_heads):
    lengths = (40, 3, 17)
    everyones = [qkv(length, kv_heads=kv_heads) for length in lengths]
    q = torch.stack([x[0][-new:] for x in everyones])
    k, v = (torch.full((3, 50, kv_heads, 16), 1e6) for _ in range(2))  # what lies behind a sequence
    for i, x in enumerate(everyones):
        k[i, : lengths[i]], v[i, : lengths[i]] = x[1], x[2]
    out = attention_with_cache(q, k, v, lengths, window)
    for i, x in enumerate(everyones):
        whole = attention_reference(*x, (0, lengths[i]), window)
        torch.testing.assert_close(out[i], whole[-new:], **TOLERANCE)


def test_never_waits_for_the_device():
    inputs = [x.to("meta") for x in qkv(48)]
    assert attention(*inputs, (0, 16, 48), 4).shape == (48, 4, 16)
    q, k, v = (x[None] for x in inputs)
    assert attention_with_cache(q[:, :3], k, v, (48,), 4).shape == (1, 3, 4, 16)


def test_plain_sequences():
    assert attention_kind((0, 8, 16), None) == "plain"
    assert attention_kind((0, 8, 16), 8) == "plain"
    assert attention_kind((0, 8, 16), 7) == "windows"
    assert attention_kind((0, 8, 15), None) == "documents"
    assert attention_kind((0, 8, 15), 7) == "windows"


def test_documents_on_a_gpu_use_the_kernel_of_torch_where_it_can():
    assert torch_impl(torch.bfloat16, 128, (9, 0)) == "varlen"
    assert torch_impl(torch.float32, 128, (9, 0)) == torch_impl(torch.bfloat16, 264, (9, 0)) == "sdpa"
    assert torch_impl(torch.bfloat16, 128, (9, 0), Scores(0.7)) == "varlen"
    assert torch_impl(torch.bfloat16, 128, (9, 0), Scores(None, 50.0)) == "sdpa"

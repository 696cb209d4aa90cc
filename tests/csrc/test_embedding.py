"""The gradient of an embedding, run on the host."""

import pytest
import torch

ops = torch.ops.triaxis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 24, 520])
@pytest.mark.parametrize("count", [0, 1, 70])
def test_adds_to_rows(emulated, count, columns, dtype):
    torch.manual_seed(count)
    emulated(columns)
    tokens = torch.randint(0, 9, (count,))
    grad = torch.randn(count, columns + 8).to(dtype)[:, 8:]
    out = torch.randn(11, columns)
    expected = out.double().index_add_(0, tokens, grad.double())
    ops.embedding_backward_(out, tokens, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_equal_tokens_add_up_in_their_order(emulated):
    """Bit for bit, whatever the order of warps, beyond a window of 8,192 tokens."""
    torch.manual_seed(0)
    tokens = torch.zeros(8300, dtype=torch.long)
    tokens[1:9] = torch.arange(8)
    grad = torch.randn(8300, 4)
    results = []
    for seed in range(2):
        emulated(seed)
        results.append(torch.zeros(8, 4))
        ops.embedding_backward_(results[-1], tokens, grad)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], torch.zeros(8, 4).index_add_(0, tokens, grad), rtol=1e-4, atol=1e-3)


def test_tokens_outside_add_nothing(emulated):
    out = torch.zeros(3, 4)
    ops.embedding_backward_(out, torch.tensor([-1, 3, 1]), torch.ones(3, 4))
    assert out.tolist() == [[0] * 4, [1] * 4, [0] * 4]


def test_arguments_are_checked(emulated):
    tokens, grad = torch.zeros(2, dtype=torch.long), torch.ones(2, 4)
    for out, given, error in (
        (torch.zeros(3, 4, dtype=torch.bfloat16), grad, "dense float32"),
        (torch.zeros(3, 5), grad, "rows of 5"),
        (torch.zeros(3, 4), grad[:1], "dense vector of 1"),
    ):
        with pytest.raises(RuntimeError, match=error):
            ops.embedding_backward_(out, tokens, given)

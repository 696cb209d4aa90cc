import pytest
import torch

from engine.ops.embedding import add_embedding_grad, embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_added_to_the_rows_of_the_tokens(dtype):
    tokens = torch.tensor([4, 0, 4, 4, 2])
    weight = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    main_grad = torch.ones(6, 8)
    rows = embedding(tokens, weight, lambda add: add(main_grad))
    expected = embedding(tokens, wide := weight.detach().float().requires_grad_())
    assert torch.equal(rows.float(), expected)
    grad = torch.randn(5, 8).to(dtype)
    rows.backward(grad)
    expected.backward(grad.float())
    assert weight.grad is None
    torch.testing.assert_close(main_grad, 1 + wide.grad)


def test_no_tokens():
    main_grad = torch.ones(3, 2)
    add_embedding_grad(main_grad, torch.empty(0, dtype=torch.long), torch.empty(0, 2))
    assert torch.equal(main_grad, torch.ones(3, 2))

"""Embedding lookup whose gradient is added to the rows of the tokens in a microbatch, never as a dense [v, h] matrix.

The kernel adds equal tokens in their order, so that results repeat bitwise. Alternatives considered: PyTorch's dense
gradient (a sort, zeros and an addition over the whole vocabulary for a few thousand rows) and atomics (in any order).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import native

AddToRows = Callable[[Callable[[Tensor], None]], None]
"""Calls a function with the fp32 main gradient [v, h], to some rows of which it adds."""


def embedding(tokens: Tensor, weight: Tensor, add_to_rows: AddToRows | None = None) -> Tensor:
    """Rows of `weight` [v, h] at `tokens` [t] int64: [t, h]. Without `add_to_rows`, the gradient goes to autograd."""
    if add_to_rows is None:
        return F.embedding(tokens, weight)
    return _Embedding.apply(tokens, weight, add_to_rows)


def add_embedding_grad(out: Tensor, tokens: Tensor, grad: Tensor) -> None:
    """Add row i of `grad` [t, h] to row tokens[i] of `out` fp32 [v, h]."""
    if native.runs(grad) and out.dtype == torch.float32:
        torch.ops.triaxis.embedding_backward_(out, tokens, grad)
    elif out.is_cuda:
        out.index_put_((tokens,), grad.to(out.dtype), accumulate=True)  # sorts; index_add_ would add in any order
    else:
        out.index_add_(0, tokens, grad.to(out.dtype))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, add_to_rows: AddToRows) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.add_to_rows = add_to_rows
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        (tokens,) = ctx.saved_tensors
        ctx.add_to_rows(lambda out: add_embedding_grad(out, tokens, grad_outputs[0]))
        return None, None, None

"""Compares a fast implementation with its reference: outputs and gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

Op = Callable[..., Tensor]
FP32 = {"rtol": 5e-4, "atol": 5e-6}  # gradients with fp32 accumulation
BF16 = {"rtol": 1e-2, "atol": 1e-2}  # one rounding of the result; atol for sums that cancel


def outputs_and_gradients(op: Op, inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The output of `op` and the gradient of every input, in fp32 or wider."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    out.backward(torch.ones_like(out) if grad is None else grad.to(out.dtype))
    results = [out.detach(), *(leaf.grad for leaf in leaves)]
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in results]


def assert_same(fast: Op, reference: Op, inputs: list[Tensor], grad: Tensor | None = None, *, rtol, atol) -> None:
    """Both agree; the reference computes in fp32 from the same (perhaps rounded) inputs."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs]
    results = outputs_and_gradients(fast, inputs, grad)
    for got, expected in zip(results, outputs_and_gradients(reference, wide, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def strided(*shape: int) -> Tensor:
    """Random numbers whose rows have gaps between them."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]

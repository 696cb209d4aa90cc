"""Fused output projection and cross-entropy, in chunks of tokens: the [t, v] logits are never materialized.

The forward pass computes the gradient of each chunk of logits, and from it those of the hidden states and the weight;
the backward pass only scales them. Alternatives considered: recomputing the logits in the backward pass (a third more
FLOPs), and chunks of the vocabulary (no faster on a CPU, and they need a second pass for the log-sum-exp).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import native
from engine.ops.linear import MATMUL_KINDS, add_grad_weight, matmul_transposed

_CHUNK_ELEMENTS_CPU = 2**23  # logits per chunk: 32 MB stay in the last-level cache and in the allocator's pool
_CHUNK_ELEMENTS_GPU = 2**28  # 512 MiB in bf16: large matmuls, and small compared with the activations


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's shard of the vocabulary, if it is sharded over tensor-parallel ranks.

    Attributes:
        first_label: label of the first row of the shard.
        most_rows: rows of the largest shard on any rank, from which all ranks compute the same chunk sizes.
        gather: all-gather that stacks every rank's tensor along a new first dimension.
    """

    first_label: int
    most_rows: int
    gather: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    onednn: frozenset[str] = MATMUL_KINDS,
) -> Tensor:
    """Sum over tokens of (z − logit of the label + z_loss · z²) · loss_mask, with z the log-sum-exp of the logits
    hidden · weightᵀ; in fp32, and NaN stays NaN.

    Differentiable once, in `hidden` [t, h] and `weight` [v, h]. `labels` is int64 [t] and may be negative where masked;
    `loss_mask` is fp32 [t], 0 where the token does not count. With a `shard`, `weight` is this rank's part of the
    vocabulary, and the gradient of `hidden` is the contribution of that part: the ranks exchange two numbers per token
    (their local z and the label's logit), never logits. `z_loss`: PaLM, arXiv 2204.02311. `onednn`:
    see `matmul_transposed`.
    """
    options = _Options(z_loss, shard, onednn)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, options)
    return _loss_and_gradients(hidden, weight, labels, loss_mask, options, False, False)[0]


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """Reference of `linear_cross_entropy` for an unsharded vocabulary; materializes the logits [t, v]."""
    logits = (hidden @ weight.t()).to(_wide(hidden))
    z = torch.logsumexp(logits, -1)
    losses = z - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] + z_loss * z.square()
    return (losses * loss_mask).sum()


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Return the tokens per chunk, a multiple of 64."""
    elements = _CHUNK_ELEMENTS_CPU if device_type == "cpu" else _CHUNK_ELEMENTS_GPU
    return max(64, elements // vocab_size // 64 * 64)


@dataclass(frozen=True)
class _Options:
    z_loss: float
    shard: VocabularyShard | None
    onednn: frozenset[str]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, options: _Options
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        loss, *ctx.gradients = _loss_and_gradients(hidden, weight, labels, loss_mask, options, *wanted)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy scales its gradients in place; backward can run only once")
        scaled = [
            None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *scaled, None, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    options: _Options,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the loss, and its gradients in fp32 if requested."""
    wide = _wide(hidden)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden, dtype=wide) if for_hidden else None
    # [h, v] on a CPU, so that the matmul transposes only its small operand
    transposed = not weight.is_cuda
    shape = weight.shape[::-1] if transposed else weight.shape
    grad_weight = torch.zeros(shape, dtype=wide, device=weight.device) if for_weight else None
    vocab_size = weight.shape[0] if options.shard is None else options.shard.most_rows
    rows = chunk_rows(vocab_size, hidden.device.type)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        x, mask = hidden[part], loss_mask[part, None]
        logits = matmul_transposed(x, weight, options.onednn)
        if native.runs(logits):
            chunk_loss, error = _loss_and_error_by_kernel(logits, labels[part], mask, options)
        else:
            chunk_loss, error = _loss_and_error(logits.to(wide), labels[part, None], mask, options)
        loss += chunk_loss
        error = error.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mul(matmul_transposed(error, weight.t(), options.onednn), mask, out=grad_hidden[part])
        if grad_weight is not None:
            masked = (x * mask).to(x.dtype)
            if transposed:
                grad_weight += matmul_transposed(masked.t(), error.t(), options.onednn)
            else:
                add_grad_weight(grad_weight, error, masked)
        del logits, error  # free them before the next chunk is computed
    if grad_weight is not None and transposed:
        grad_weight = grad_weight.t().contiguous()
    return loss, grad_hidden, grad_weight


def _loss_and_error_by_kernel(logits: Tensor, labels: Tensor, mask: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Same as `_loss_and_error`, with two kernels on logits of any dtype; `labels` [c]."""
    first = 0 if options.shard is None else options.shard.first_label
    z, at_label = torch.ops.triaxis.cross_entropy_statistics(logits, labels, first)
    if options.shard is not None:
        gathered = options.shard.gather(torch.stack((z, at_label), 1))  # [ranks, c, 2]
        z, at_label = torch.logsumexp(gathered[..., 0], 0), gathered[..., 1].sum(0)
    loss = ((z - at_label + options.z_loss * z.square()) * mask[:, 0]).sum()
    torch.ops.triaxis.cross_entropy_gradient_(logits, labels, z, torch.ones_like(z), first, options.z_loss)
    return loss, logits


def _loss_and_error(logits: Tensor, labels: Tensor, mask: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Compute the loss of a chunk [c, v], and overwrite its logits by their unmasked gradient; `labels` [c, 1]."""
    first = 0 if options.shard is None else options.shard.first_label
    local = labels - first
    held = (local >= 0) & (local < logits.shape[1])  # [c, 1]
    local = local.clamp(0, logits.shape[1] - 1)
    top, at_label = logits.amax(-1, keepdim=True), logits.gather(1, local).masked_fill(~held, 0)
    probabilities = torch.softmax(logits, -1, out=logits)
    # the largest probability is 1/Σexp(logit − top); taking its logarithm saves a pass over the logits
    own = z = top - probabilities.amax(-1, keepdim=True).log_()
    if options.shard is not None:
        gathered = options.shard.gather(torch.cat((z, at_label), 1))  # [ranks, c, 2]
        z, at_label = torch.logsumexp(gathered[..., :1], 0), gathered[..., 1:].sum(0)
    if options.shard is not None or options.z_loss:
        probabilities.mul_((1 + 2 * options.z_loss * z) * torch.exp(own - z))
    loss = ((z - at_label + options.z_loss * z.square()) * mask).sum()
    # not scatter_add_, which fails under PyTorch's deterministic algorithms on a GPU
    return loss, probabilities.scatter_(1, local, probabilities.gather(1, local) - held.to(probabilities.dtype))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

"""Fused output projection and cross-entropy, in chunks of tokens: the [t, v] logits are never materialized.

The forward pass computes the gradient of each chunk of logits, and from it those of the hidden states and the weight.
In training the factor of the loss is known in advance, so that the weight's gradient goes straight into the main
gradient. Alternatives considered: recomputing the logits in the backward pass (a third more FLOPs), and chunks of the
vocabulary (no faster on a CPU, and they need a second pass for the log-sum-exp).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import native
from engine.ops.linear import MATMUL_KINDS, add_grad_weight, add_or_copy, matmul_transposed

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


@dataclass(frozen=True)
class WeightSink:
    """Takes the gradient of the weight instead of autograd; see `GradientSink`.

    Attributes:
        add_matmul: calls a function of the fp32 main gradient [v, h] and of whether to accumulate into it; used in the
            forward pass.
        arrived: called in the backward pass, if given.
    """

    add_matmul: Callable[[Callable[[Tensor, bool], None]], None]
    arrived: Callable[[], None] | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    scale: float = 1.0,
    sink: WeightSink | None = None,
    onednn: frozenset[str] = MATMUL_KINDS,
    softcap: float | None = None,
) -> Tensor:
    """Sum over tokens of (z − logit of the label + z_loss · z²) · loss_mask · scale, with z the log-sum-exp of the
    logits hidden · weightᵀ; in fp32, and NaN stays NaN.

    Differentiable once, in `hidden` [t, h] and `weight` [v, h]. `labels` is int64 [t] and may be negative where masked;
    `loss_mask` is fp32 [t], 0 where the token does not count. With a `shard`, `weight` is this rank's part of the
    vocabulary, and the gradient of `hidden` is the contribution of that part: the ranks exchange two numbers per token
    (their local z and the label's logit), never logits. `z_loss`: PaLM, arXiv 2204.02311. `onednn`:
    see `matmul_transposed`. With a `sink`, which gets the weight's gradient before a backward pass has said what the
    loss is multiplied by, the gradient of the result is 1. A `softcap` limits the logits to softcap · tanh(logit /
    softcap), in plain PyTorch.
    """
    options = _Options(z_loss, shard, scale, sink, onednn, softcap)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, options)
    return _loss_and_gradients(hidden, weight, labels, loss_mask, options, False, False)[0]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Reference of `linear_cross_entropy` for an unsharded vocabulary; materializes the logits [t, v]."""
    logits = (hidden @ weight.t()).to(_wide(hidden))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
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
    scale: float
    sink: WeightSink | None
    onednn: frozenset[str]
    softcap: float | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, options: _Options
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        loss, *ctx.gradients = _loss_and_gradients(hidden, weight, labels, loss_mask, options, *wanted)
        ctx.sink = options.sink
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy scales its gradients in place; backward can run only once")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.sink is None:
            gradients = [None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients]
        else:
            if grad_outputs[0].device.type == "cpu" and grad_outputs[0] != 1:  # on a GPU the host would wait
                raise RuntimeError("with a sink, the loss of linear_cross_entropy is multiplied by `scale` alone")
            if ctx.sink.arrived is not None:
                ctx.sink.arrived()
        return *gradients, None, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    options: _Options,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the loss, and its gradients if requested, in the dtypes of their tensors; that of the weight goes to the
    sink if there is one.
    """
    wide = _wide(hidden)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if for_hidden else None
    collected = _WeightGradient(weight, options) if for_weight else None
    factors = loss_mask * options.scale
    vocab_size = weight.shape[0] if options.shard is None else options.shard.most_rows
    rows = chunk_rows(vocab_size, hidden.device.type)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        x, factor = hidden[part], factors[part]
        logits = matmul_transposed(x, weight, options.onednn)
        if by_kernel := options.softcap is None and native.runs(logits):
            chunk_loss, error = _loss_and_error_by_kernel(logits, labels[part], factor, options)
        else:
            loss_and_error = _loss_and_error if options.softcap is None else _softcapped_loss_and_error
            chunk_loss, error = loss_and_error(logits.to(wide), labels[part, None], factor[:, None], options)
            error = error.to(hidden.dtype)
        loss += chunk_loss
        if grad_hidden is not None:
            if by_kernel:
                torch.mm(error, weight, out=grad_hidden[part])
            else:
                grad = matmul_transposed(error, weight.t(), options.onednn)
                torch.mul(grad, factor[:, None], out=grad_hidden[part])
        if collected is not None:
            collected.add(error, x if by_kernel else (x * factor[:, None]).to(x.dtype))
        del logits, error  # free them before the next chunk is computed
    return loss, grad_hidden, None if collected is None else collected.finish()


class _WeightGradient:
    """Adds up the weight's gradient [v, h] over the chunks: on a GPU straight into the main gradient, on a CPU as
    [h, v], so that the matmul transposes only its small operand.
    """

    def __init__(self, weight: Tensor, options: _Options) -> None:
        self.weight, self.sink, self.onednn = weight, options.sink, options.onednn
        self.total: Tensor | None = None

    def add(self, error: Tensor, x: Tensor) -> None:
        """Add errorᵀ·x, for `error` [c, v] and `x` [c, h]."""
        if not self.weight.is_cuda:
            product = matmul_transposed(x.t(), error.t(), self.onednn)  # [h, v]
            self.total = product.to(_wide(product)) if self.total is None else self.total.add_(product)
        elif self.sink is not None:
            self.sink.add_matmul(lambda out, accumulate: add_grad_weight(out, error, x, accumulate))
        else:
            if self.total is None:
                self.total = torch.zeros_like(self.weight, dtype=_wide(x))
            add_grad_weight(self.total, error, x)

    def finish(self) -> Tensor | None:
        """The gradient for autograd in the weight's dtype, or None: the sink has it."""
        total = self.total
        if total is not None and not self.weight.is_cuda:
            total = total.t()
        if self.sink is None:
            return torch.zeros_like(self.weight) if total is None else total.to(self.weight.dtype)
        if total is not None:
            given = total
            self.sink.add_matmul(lambda out, accumulate: add_or_copy(out, given, accumulate))
        return None


def _loss_and_error_by_kernel(
    logits: Tensor, labels: Tensor, factor: Tensor, options: _Options
) -> tuple[Tensor, Tensor]:
    """Compute the loss of a chunk [c, v] with two kernels, and overwrite its logits, of any dtype, by their gradient;
    `labels`, `factor` [c].
    """
    first = 0 if options.shard is None else options.shard.first_label
    z, at_label = torch.ops.triaxis.cross_entropy_statistics(logits, labels, first)
    if options.shard is not None:
        gathered = options.shard.gather(torch.stack((z, at_label), 1))  # [ranks, c, 2]
        z, at_label = torch.logsumexp(gathered[..., 0], 0), gathered[..., 1].sum(0)
    losses = z - at_label
    if options.z_loss:
        losses += options.z_loss * z.square()
    torch.ops.triaxis.cross_entropy_gradient_(logits, labels, z, factor, first, options.z_loss)
    return (losses * factor).sum(), logits


def _softcapped_loss_and_error(
    logits: Tensor, labels: Tensor, factor: Tensor, options: _Options
) -> tuple[Tensor, Tensor]:
    """`_loss_and_error` of the limited logits, with the gradient of the logits before the limit."""
    cap = options.softcap
    assert cap is not None
    slope = logits.div_(cap).tanh_().square().neg_().add_(1)  # of softcap · tanh(logit / softcap)
    loss, error = _loss_and_error(logits.mul_(cap), labels, factor, options)
    return loss, error.mul_(slope)


def _loss_and_error(logits: Tensor, labels: Tensor, factor: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Compute the loss of a chunk [c, v], and overwrite its logits by their gradient without the factor; `labels` and
    `factor` [c, 1].
    """
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
    loss = ((z - at_label + options.z_loss * z.square()) * factor).sum()
    # not scatter_add_, which fails under PyTorch's deterministic algorithms on a GPU
    return loss, probabilities.scatter_(1, local, probabilities.gather(1, local) - held.to(probabilities.dtype))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

"""Tensor parallelism with sequence parallelism: layers sharded over a process group.

Between layers every rank holds a shard of the tokens, [t/tp, h]. A column-parallel layer all-gathers the tokens and
computes a shard of the features; a row-parallel layer takes such a shard and reduce-scatters the partial sums back to
[t/tp, h] (Korthikanti et al., arXiv 2205.05198). With tp = 1 there is no communication.

Legend: t tokens of a microbatch, h hidden size, v vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops.cross_entropy import VocabularyShard, WeightSink, linear_cross_entropy
from engine.ops.embedding import embedding
from engine.ops.fp8 import add_scaled_matmul, scaled_matmul, transpose
from engine.ops.linear import MATMUL_KINDS, add_grad_weight, grad_weight, linear, matmul_transposed
from engine.ops.quantize import TENSORWISE, ActivationWithAmax, Fp8Activation, GradHandover, QuantizedTensor
from engine.parallel.collectives import all_gather, gather_sequence, gathered, reduce_scatter, scatter_sequence_sum
from engine.parallel.fp8 import Fp8Quantizer, gather_rows
from engine.parallel.gradients import GradientSink
from engine.parallel.layout import TensorParallel

Activation = Tensor | ActivationWithAmax | Fp8Activation
"""The input of a linear layer [t, in]: in the model's dtype, perhaps with its amax, or quantized to FP8."""


def column_linear(
    x: Activation,
    weight: Tensor,
    bias: Tensor | None,
    tp: TensorParallel,
    sink: GradientSink | None = None,
    quantizer: Fp8Quantizer | None = None,
    handover: GradHandover | None = None,
    onednn: frozenset[str] = MATMUL_KINDS,
) -> Tensor:
    """Column-parallel linear, x·Wᵀ + b: `x` [t/tp, in], `weight` [out/tp, in], `bias` [out/tp] -> [t, out/tp].

    Args:
        sink: accumulates the weight's gradient; None leaves it to autograd.
        quantizer: if given, the matmuls are in FP8; needs a sink.
        handover: how the op that follows hands over the gradient of the output; needs a quantizer.
        onednn: kinds of fp32 matmuls on a CPU that oneDNN computes; see `matmul_transposed`.
    """
    sink = _usable(sink)
    if isinstance(x, Tensor) and tp.size == 1 and sink is None:
        return linear(x, weight, bias)
    out = _matmul(x, weight, tp, sink, quantizer, onednn, handover)
    return out if bias is None else out + bias


def row_linear(
    x: Activation,
    weight: Tensor,
    bias: Tensor | None,
    tp: TensorParallel,
    sink: GradientSink | None = None,
    quantizer: Fp8Quantizer | None = None,
    onednn: frozenset[str] = MATMUL_KINDS,
) -> Tensor:
    """Row-parallel linear, x·Wᵀ + b: `x` [t, in/tp], `weight` [out, in/tp], `bias` [out] -> [t/tp, out]; `sink`,
    `quantizer` and `onednn` as for `column_linear`.
    """
    sink = _usable(sink)
    if isinstance(x, Tensor) and tp.size == 1 and sink is None:
        return linear(x, weight, bias)
    out = scatter_sequence_sum(_matmul(x, weight, None, sink, quantizer, onednn), tp.group)
    return out if bias is None else out + bias


def vocab_parallel_embedding(
    tokens: Tensor, weight: Tensor, vocab_size: int, tp: TensorParallel, sink: GradientSink | None = None
) -> Tensor:
    """Vocab-parallel embedding lookup: `tokens` [t] int64, `weight` this rank's shard of [v, h] -> [t/tp, h]; `sink` as
    for `column_linear`.
    """
    add_to_rows = None if sink is None else sink.add_to_rows
    if tp.size == 1:
        return embedding(tokens, weight, add_to_rows)
    start, extent = tp.share(vocab_size)
    local = tokens - start
    elsewhere = (local < 0) | (local >= extent)
    rows = embedding(local.remainder(extent), weight, add_to_rows)  # [t, h]; to those of elsewhere zeros are added
    return scatter_sequence_sum(rows.masked_fill(elsewhere[:, None], 0), tp.group)


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    vocab_size: int,
    tp: TensorParallel,
    z_loss: float = 0.0,
    target_indices: Tensor | None = None,
    scale: float = 1.0,
    sink: WeightSink | None = None,
    onednn: frozenset[str] = MATMUL_KINDS,
    softcap: float | None = None,
) -> Tensor:
    """Vocab-parallel output projection fused with cross-entropy; see `linear_cross_entropy`.

    Args:
        hidden: [t/tp, h].
        weight: this rank's shard of [v, h].
        labels, loss_mask: [t].
        target_indices: int64 indices of the tokens with a nonzero `loss_mask`; if given, logits are computed only for
            these.
        scale, sink, softcap: as for `linear_cross_entropy`.
        onednn: as for `column_linear`.

    Returns:
        `scale` times the loss summed over all t tokens, the same on every tensor-parallel rank.
    """
    shard = None
    if tp.size > 1:
        shard = VocabularyShard(tp.share(vocab_size)[0], -(-vocab_size // tp.size), lambda x: _gather_stacked(x, tp))
        hidden = gather_sequence(hidden, tp.group)
    if target_indices is not None:
        hidden, labels, loss_mask = (x.index_select(0, target_indices) for x in (hidden, labels, loss_mask))
    return linear_cross_entropy(
        hidden,
        weight,
        labels,
        loss_mask,
        z_loss=z_loss,
        shard=shard,
        scale=scale,
        sink=sink,
        onednn=onednn,
        softcap=softcap,
    )


def _gather_stacked(x: Tensor, tp: TensorParallel) -> Tensor:
    assert tp.group is not None
    return gathered(x, tp.group).unflatten(0, (tp.size, -1))


def _usable(sink: GradientSink | None) -> GradientSink | None:
    """None under the compiler, which has to see a plain matmul."""
    return None if torch.compiler.is_compiling() else sink


def _matmul(
    x: Activation,
    weight: Tensor,
    gather: TensorParallel | None,
    sink: GradientSink | None,
    quantizer: Fp8Quantizer | None,
    onednn: frozenset[str],
    handover: GradHandover | None = None,
) -> Tensor:
    """x·Wᵀ for all tokens. `gather`: the ranks to all-gather `x` [t/tp, in] from; None in a row-parallel layer, where x
    has all tokens and a shard of the features.
    """
    if quantizer is None:
        assert isinstance(x, Tensor)
        return _Linear.apply(x, weight, gather, sink, onednn)
    if isinstance(x, Fp8Activation):
        return _Fp8Linear.apply(x.carrier, x.quantized, x.transposed, weight, gather, sink, quantizer, handover)
    values, amax = (x.values, x.amax) if isinstance(x, ActivationWithAmax) else (x, None)
    # the weight's gradient reads the transpose of all tokens
    transposed = torch.is_grad_enabled() and (gather is None or gather.group is None)
    local, local_t = quantizer.quantize_input(values.detach(), amax, transposed=transposed)
    return _Fp8Linear.apply(values, local, local_t, weight, gather, sink, quantizer, handover)


class _Linear(torch.autograd.Function):
    """x·Wᵀ. The backward overlaps the all-gather of x with the matmul of the input's gradient, and the reduce-scatter
    of that gradient with the matmul of the weight's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gather: TensorParallel | None,
        sink: GradientSink | None,
        onednn: frozenset[str],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.sink, ctx.group = weight, sink, None if gather is None else gather.group
        ctx.onednn = onednn
        return matmul_transposed(gather_sequence(x, ctx.group), weight, onednn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, group, grad = ctx.saved_tensors, ctx.weight, ctx.group, grad_outputs[0].contiguous()
        if group is None:
            grad_x = matmul_transposed(grad, weight.t(), ctx.onednn) if ctx.needs_input_grad[0] else None
            return grad_x, _grad_weight(ctx, grad, x), None, None, None
        full_x = x.new_empty(group.size() * x.shape[0], x.shape[1])
        gathering = all_gather(full_x, x.contiguous(), group)
        partial, grad_x = matmul_transposed(grad, weight.t(), ctx.onednn), torch.empty_like(x)
        scattering = reduce_scatter(grad_x, partial, group)
        gathering.wait()
        weight_grad = _grad_weight(ctx, grad, full_x)
        scattering.wait()
        return grad_x, weight_grad, None, None, None


def _grad_weight(ctx: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    """Return the weight's gradient for autograd, or None if it goes to the sink or is not needed."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.sink is None:
        return grad_weight(grad, x, ctx.onednn)
    grad, x, onednn = grad.detach(), x.detach(), ctx.onednn
    ctx.sink.add_matmul(lambda out, accumulate: add_grad_weight(out, grad, x, accumulate, onednn))
    return None


class _Fp8Linear(torch.autograd.Function):
    """FP8 version of `_Linear`. It all-gathers FP8 values, and saves only this rank's for the backward: transposed if
    they are so already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        local: QuantizedTensor,
        local_t: QuantizedTensor | None,
        weight: Tensor,
        gather: TensorParallel | None,
        sink: GradientSink,
        quantizer: Fp8Quantizer,
        handover: GradHandover | None,
    ) -> Tensor:
        """`local`: this rank's tokens in FP8; `local_t`: their transpose, if it has been written. `x`, their values or
        a placeholder without memory, and `weight` are passed only so that autograd tracks them: the matmuls read the
        quantized copies.
        """
        ctx.quantizer, ctx.sink, ctx.dtype, ctx.handover = quantizer, sink, x.dtype, handover
        ctx.group = group = None if gather is None else gather.group
        saved = local if local_t is None else local_t
        ctx.save_for_backward(saved.values, saved.scale_inv)
        ctx.scaling, ctx.is_transposed = saved.scaling, local_t is not None
        quantized = local if group is None else gather_rows(local, group)
        fast = quantized.scaling == TENSORWISE
        return scaled_matmul(quantized, quantizer.quantized_weight()[0], x.dtype, fast=fast, impl=quantizer.impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        quantizer, group = ctx.quantizer, ctx.group
        values, scale_inv = ctx.saved_tensors
        x = QuantizedTensor(values, scale_inv, ctx.scaling)
        grad, grad_transposed = quantizer.quantize_grad_output(
            grad_outputs[0], reduce_amax=group is not None, handover=ctx.handover
        )
        grad_x = scaled_matmul(grad, quantizer.quantized_weight()[1], ctx.dtype, impl=quantizer.impl)
        if group is not None:
            partial, grad_x = grad_x, grad_x.new_empty(grad_x.shape[0] // group.size(), grad_x.shape[1])
            scattering = reduce_scatter(grad_x, partial, group)
            x = gather_rows(x, group)
        operands, impl = (grad_transposed, x if ctx.is_transposed else transpose(x)), quantizer.impl
        ctx.sink.add_matmul(lambda out, accumulate: add_scaled_matmul(out, *operands, accumulate=accumulate, impl=impl))
        if group is not None:
            scattering.wait()
        return grad_x, None, None, None, None, None, None, None

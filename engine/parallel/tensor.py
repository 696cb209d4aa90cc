"""Tensor parallelism with sequence parallelism: layers cut over the ranks of a group.

Between layers every rank holds its part of the tokens, [t/tp, h]. A column-parallel layer gathers all tokens and
produces its part of the features; a row-parallel layer consumes such a part and scatters the sum over the ranks back to
parts of the tokens (Korthikanti et al., arXiv 2205.05198). With one rank nothing is sent and the layers are plain.

Legend: t tokens of a microbatch, h hidden size, v vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops.cross_entropy import VocabularyShard, linear_cross_entropy
from engine.ops.fp8 import add_scaled_matmul, scaled_matmul, transpose
from engine.ops.linear import add_grad_weight, grad_weight, linear, matmul_transposed
from engine.ops.quantize import TENSORWISE, Fp8Activation, QuantizedTensor
from engine.parallel.collectives import all_gather, gather_sequence, reduce_scatter, scatter_sequence_sum
from engine.parallel.fp8 import Fp8Layer, gather_rows, own_rows
from engine.parallel.gradients import GradientSink
from engine.parallel.layout import TensorParallel

Activation = Tensor | Fp8Activation
"""What a linear layer reads: [t, in], in the model's dtype or in FP8 alone."""


def column_linear(
    x: Activation,
    weight: Tensor,
    bias: Tensor | None,
    tp: TensorParallel,
    sink: GradientSink | None = None,
    fp8: Fp8Layer | None = None,
) -> Tensor:
    """This rank's features of x·Wᵀ + b: `x` [t/tp, in], `weight` [out/tp, in], `bias` [out/tp] -> [t, out/tp].

    Args:
        sink: takes the weight's gradient; without one it goes to autograd.
        fp8: the scales of the layer, if its matmuls are in FP8; needs a sink.
    """
    sink = _usable(sink)
    if isinstance(x, Tensor) and tp.size == 1 and sink is None:
        return linear(x, weight, bias)
    out = _matmul(x, weight, tp, sink, fp8)
    return out if bias is None else out + bias


def row_linear(
    x: Activation,
    weight: Tensor,
    bias: Tensor | None,
    tp: TensorParallel,
    sink: GradientSink | None = None,
    fp8: Fp8Layer | None = None,
) -> Tensor:
    """This rank's tokens of x·Wᵀ + b: `x` [t, in/tp], `weight` [out, in/tp], `bias` [out] -> [t/tp, out]; `sink` and
    `fp8` as for `column_linear`."""
    sink = _usable(sink)
    if isinstance(x, Tensor) and tp.size == 1 and sink is None:
        return linear(x, weight, bias)
    out = scatter_sequence_sum(_matmul(x, weight, None, sink, fp8), tp.group)
    return out if bias is None else out + bias


def vocabulary_embedding(tokens: Tensor, weight: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """Rows of the embedding: `tokens` [t] int64, `weight` this rank's share of [v, h] -> [t/tp, h]."""
    if tp.size == 1:
        return F.embedding(tokens, weight)
    start, extent = tp.share(vocab_size)
    local = tokens - start
    elsewhere = (local < 0) | (local >= extent)
    rows = F.embedding(local.masked_fill(elsewhere, 0), weight)  # [t, h]
    return scatter_sequence_sum(rows.masked_fill(elsewhere[:, None], 0), tp.group)


def vocabulary_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    vocab_size: int,
    tp: TensorParallel,
    z_loss: float = 0.0,
    target_indices: Tensor | None = None,
) -> Tensor:
    """Summed loss of all t tokens, the same on every rank: `hidden` [t/tp, h], `weight` this rank's share of [v, h],
    `labels` and `loss_mask` [t]. See `linear_cross_entropy`.

    `target_indices`: int64, the tokens that `loss_mask` leaves; where given, no logits are computed for the others.
    """
    shard = None
    if tp.size > 1:
        shard = VocabularyShard(tp.share(vocab_size)[0], -(-vocab_size // tp.size), lambda x: _stack(x, tp))
        hidden = gather_sequence(hidden, tp.group)
    if target_indices is not None:
        hidden, labels, loss_mask = (x.index_select(0, target_indices) for x in (hidden, labels, loss_mask))
    return linear_cross_entropy(hidden, weight, labels, loss_mask, z_loss=z_loss, shard=shard)


def _stack(x: Tensor, tp: TensorParallel) -> Tensor:
    assert tp.group is not None
    out = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
    all_gather(out, x.contiguous(), tp.group).wait()
    return out.unflatten(0, (tp.size, -1))


def _usable(sink: GradientSink | None) -> GradientSink | None:
    """None under the compiler, which has to see a plain matmul."""
    return None if torch.compiler.is_compiling() else sink


def _matmul(
    x: Activation, weight: Tensor, tp: TensorParallel | None, sink: GradientSink | None, fp8: Fp8Layer | None
) -> Tensor:
    """x·Wᵀ for all tokens, with `x` [t/tp, in] gathered over `tp` (None: x has all tokens, and a share of features)."""
    if fp8 is None:
        assert isinstance(x, Tensor)
        return _Linear.apply(x, weight, tp, sink)
    if isinstance(x, Fp8Activation):
        return _Fp8Linear.apply(x.carrier, x.quantized, weight, tp, sink, fp8)
    return _Fp8Linear.apply(x, None, weight, tp, sink, fp8)


class _Linear(torch.autograd.Function):
    """x·Wᵀ. The backward gathers x behind the matmul of the input's gradient, and scatters that gradient behind the
    matmul of the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tp: TensorParallel | None, sink: GradientSink | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.sink, ctx.tp = weight, sink, tp if tp is not None and tp.size > 1 else None
        return matmul_transposed(x if ctx.tp is None else gather_sequence(x, ctx.tp.group), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, tp, grad = ctx.saved_tensors, ctx.weight, ctx.tp, grad_outputs[0].contiguous()
        if tp is None:
            grad_x = matmul_transposed(grad, weight.t()) if ctx.needs_input_grad[0] else None
            return grad_x, _grad_weight(ctx, grad, x), None, None
        everything = x.new_empty(tp.size * x.shape[0], x.shape[1])
        gathering = all_gather(everything, x.contiguous(), tp.group)
        partial, grad_x = matmul_transposed(grad, weight.t()), torch.empty_like(x)
        scattering = reduce_scatter(grad_x, partial, tp.group)
        gathering.wait()
        weight_grad = _grad_weight(ctx, grad, everything)
        scattering.wait()
        return grad_x, weight_grad, None, None


def _grad_weight(ctx: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    """The weight's gradient for autograd, or None: it goes to the sink, or is not needed."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.sink is None:
        return grad_weight(grad, x)
    grad, x = grad.detach(), x.detach()
    ctx.sink.add_matmul(lambda out: add_grad_weight(out, grad, x))
    return None


class _Fp8Linear(torch.autograd.Function):
    """The same in FP8. Only the quantized input is kept for the backward, and of it this rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: QuantizedTensor | None,
        weight: Tensor,
        tp: TensorParallel | None,
        sink: GradientSink,
        layer: Fp8Layer,
    ) -> Tensor:
        """`own`: this rank's tokens in FP8, if the op before has quantized them; `x` then has no values. `weight` is
        here for autograd alone: the matmuls read the quantized copy that `layer` keeps."""
        ctx.layer, ctx.sink, ctx.tp, ctx.dtype = layer, sink, tp if tp is not None and tp.size > 1 else None, x.dtype
        if own is None:
            quantized = layer.input(x if ctx.tp is None else gather_sequence(x, ctx.tp.group), sharded=tp is None)
            kept = quantized if ctx.tp is None else own_rows(quantized, ctx.tp)
        else:
            kept = own
            quantized = own if ctx.tp is None else gather_rows(own, ctx.tp.group)
        ctx.save_for_backward(kept.values, kept.scale_inv)
        ctx.scaling = kept.scaling
        return scaled_matmul(
            quantized, layer.quantized_weight()[0], x.dtype, fast=quantized.scaling == TENSORWISE, impl=layer.impl
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layer, tp = ctx.layer, ctx.tp
        values, scale_inv = ctx.saved_tensors
        x = QuantizedTensor(values, scale_inv, ctx.scaling)
        grad, grad_transposed = layer.grad(grad_outputs[0].contiguous(), sharded=tp is not None)
        grad_x = scaled_matmul(grad, layer.quantized_weight()[1], ctx.dtype, impl=layer.impl)
        if tp is not None:
            partial, grad_x = grad_x, grad_x.new_empty(grad_x.shape[0] // tp.size, grad_x.shape[1])
            scattering = reduce_scatter(grad_x, partial, tp.group)
            x = gather_rows(x, tp.group)
        x_transposed = transpose(x)
        ctx.sink.add_matmul(lambda out: add_scaled_matmul(out, grad_transposed, x_transposed, impl=layer.impl))
        if tp is not None:
            scattering.wait()
        return grad_x, None, None, None, None, None

"""Layers on ranks against the whole layer on one, in float64, with collectives that are late."""

import pytest
import torch
from torch import Tensor, nn

from engine.ops.cross_entropy import linear_cross_entropy_reference
from engine.parallel.gradients import GradientFlow, GradientSink, trained_parameter
from engine.parallel.layout import Layout, TensorParallel
from engine.parallel.tensor import (
    column_linear,
    row_linear,
    vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
)
from engine.testing.distributed import run_ranks, world_of
from tests.parallel.late import late

TOKENS, HIDDEN, FEATURES, VOCABULARY = 12, 8, 20, 11
KINDS = ("plain", "trained", "postponed", "frozen")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Layer:
    """Parameters of one kind, and their gradients wherever they go."""

    def __init__(self, kind: str, *values: Tensor) -> None:
        self.kind = kind
        self.flow = GradientFlow(lambda _: None)
        self.flow.postponed = [] if kind == "postponed" else None
        self.sinks: list[GradientSink] = []
        self.parameters = [self._parameter(value.clone()) for value in values]

    def _parameter(self, value: Tensor) -> nn.Parameter:
        if self.kind == "plain":
            return nn.Parameter(value)
        self.sinks.append(GradientSink("", torch.zeros_like(value), self.flow))
        return trained_parameter(value, self.sinks[-1]).requires_grad_(self.kind != "frozen")

    @property
    def sink(self) -> GradientSink | None:
        """That of the weight."""
        return next(iter(self.sinks), None)

    def gradients(self) -> list[Tensor]:
        """Those of all parameters; matmuls that were postponed are added first, and not before."""
        if self.kind == "plain":
            return [parameter.grad for parameter in self.parameters]
        if self.kind == "postponed":
            assert not self.sink.main_grad.any()
            (matmul,) = self.flow.postponed
            matmul()
        assert all(parameter.grad is None for parameter in self.parameters)
        return [sink.main_grad for sink in self.sinks]


def assert_gradients(layer: Layer, expected: list[Tensor]) -> None:
    for got, want in zip(layer.gradients(), expected, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(want) if layer.kind == "frozen" else want, **EXACT)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def part_of(x: Tensor, tp: TensorParallel, dim: int = 0) -> Tensor:
    return x.narrow(dim, *tp.share(x.shape[dim])).clone()


def columns(tp: TensorParallel) -> None:
    for kind in KINDS:
        for with_bias in (False, True):
            x, weight, bias = random(TOKENS, HIDDEN), random(FEATURES, HIDDEN), random(FEATURES)
            grad = random(TOKENS, FEATURES)
            values = [weight, bias] if with_bias else [weight]
            layer = Layer(kind, *(part_of(value, tp) for value in values))
            mine = part_of(x, tp).requires_grad_()
            with late():
                out = column_linear(mine, layer.parameters[0], *(layer.parameters[1:] or [None]), tp, layer.sink)
                out.backward(part_of(grad, tp, 1))
            expected = x @ weight.t() + (bias if with_bias else 0)
            torch.testing.assert_close(out, part_of(expected, tp, 1), **EXACT)
            torch.testing.assert_close(mine.grad, part_of(grad @ weight, tp), **EXACT)
            gradients = [grad.t() @ x, grad.sum(0)][: len(values)]
            assert_gradients(layer, [part_of(gradient, tp) for gradient in gradients])


def rows(tp: TensorParallel) -> None:
    """The bias is added once, and each rank has its tokens' part of its gradient."""
    for kind in KINDS:
        for with_bias in (False, True):
            x, weight, bias = random(TOKENS, FEATURES), random(HIDDEN, FEATURES), random(HIDDEN)
            grad = random(TOKENS, HIDDEN)
            layer = Layer(kind, part_of(weight, tp, 1), *([bias] if with_bias else []))
            mine = part_of(x, tp, 1).requires_grad_()
            with late():
                out = row_linear(mine, layer.parameters[0], *(layer.parameters[1:] or [None]), tp, layer.sink)
                out.backward(part_of(grad, tp))
            expected = x @ weight.t() + (bias if with_bias else 0)
            torch.testing.assert_close(out, part_of(expected, tp), **EXACT)
            torch.testing.assert_close(mine.grad, part_of(grad @ weight, tp, 1), **EXACT)
            gradients = [part_of(grad.t() @ x, tp, 1), part_of(grad, tp).sum(0)]
            assert_gradients(layer, gradients[: 1 + with_bias])


def embedding(tp: TensorParallel) -> None:
    tokens = torch.randint(0, VOCABULARY, (TOKENS,))
    tokens[:3] = torch.tensor([0, VOCABULARY - 1, 0])
    weight, grad = random(VOCABULARY, HIDDEN), random(TOKENS, HIDDEN)
    for kind in ("plain", "trained"):
        layer = Layer(kind, part_of(weight, tp))
        with late():
            out = vocab_parallel_embedding(tokens, layer.parameters[0], VOCABULARY, tp)
            out.backward(part_of(grad, tp))
        torch.testing.assert_close(out, part_of(weight[tokens], tp), **EXACT)
        assert_gradients(layer, [part_of(torch.zeros_like(weight).index_add_(0, tokens, grad), tp)])


def cross_entropy(tp: TensorParallel) -> None:
    hidden, weight = random(TOKENS, HIDDEN), random(VOCABULARY, HIDDEN)
    mask = torch.ones(TOKENS).index_fill(0, torch.tensor([1, 4, 5]), 0)
    labels = torch.randint(0, VOCABULARY, (TOKENS,)).where(mask > 0, -100)
    for kind in ("plain", "trained"):
        for z_loss, learned in ((0.0, None), (0.1, None), (0.1, mask.nonzero().flatten())):
            layer = Layer(kind, part_of(weight, tp))
            mine = part_of(hidden, tp).requires_grad_()
            with late():
                shares = (mine, layer.parameters[0], labels, mask)
                loss = vocab_parallel_linear_cross_entropy(*shares, VOCABULARY, tp, z_loss, learned)
                (loss / 3).backward()
            whole = [value.clone().requires_grad_() for value in (hidden, weight)]
            expected = linear_cross_entropy_reference(*whole, labels, mask, z_loss=z_loss)
            (expected / 3).backward()
            torch.testing.assert_close(loss, expected, **EXACT)
            torch.testing.assert_close(mine.grad, part_of(whole[0].grad, tp), **EXACT)
            assert_gradients(layer, [part_of(whole[1].grad, tp)])


def all_layers(ranks: int) -> None:
    tp = world_of(Layout(tp=ranks)).tp
    for layer in (columns, rows, embedding, cross_entropy):
        torch.manual_seed(0)  # the same numbers on every rank
        layer(tp)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_are_the_whole_layer(ranks):
    run_ranks(ranks, all_layers, ranks)


def cross_entropy_traffic(vocab_size: int) -> int:
    tp = world_of(Layout(tp=2)).tp
    hidden = random(TOKENS // 2, HIDDEN).requires_grad_()
    weight = part_of(random(vocab_size, HIDDEN), tp).requires_grad_()
    labels = torch.randint(0, vocab_size, (TOKENS,))
    with late() as traffic:
        vocab_parallel_linear_cross_entropy(hidden, weight, labels, torch.ones(TOKENS), vocab_size, tp).backward()
    return sum(traffic.elements)


def test_cross_entropy_never_sends_logits():
    """Its hidden states, two numbers a token, and the gradients of the hidden states; whatever the vocabulary."""
    expected = TOKENS // 2 * HIDDEN + 2 * TOKENS + TOKENS * HIDDEN
    assert run_ranks(2, cross_entropy_traffic, 50_001) == [expected] * 2


def column_backward() -> list[str]:
    tp = world_of(Layout(tp=2)).tp
    layer = Layer("trained", random(FEATURES // 2, HIDDEN))
    (weight,) = layer.parameters
    out = column_linear(random(TOKENS // 2, HIDDEN).requires_grad_(), weight, None, tp, layer.sink)
    with late() as traffic:
        layer.flow.is_last_pass = True
        layer.flow.completed = lambda _: traffic.events.append("weight gradient")
        out.sum().backward()
    return traffic.events


def test_the_backward_of_a_column_layer_computes_while_it_communicates():
    for events in run_ranks(2, column_backward):
        assert events == [
            "start all_gather",
            "start reduce_scatter",
            "wait all_gather",
            "weight gradient",
            "wait reduce_scatter",
        ]

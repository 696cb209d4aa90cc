"""Every schedule on real ranks, with small parts and late messages, against the plain loop."""

import random
import time
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.parallel.gradients import GradientFlow, GradientSink, trained_parameter
from engine.parallel.layout import NO_TP, Layout, World
from engine.parallel.pipeline.check import check_schedule
from engine.parallel.pipeline.executor import Pipeline
from engine.parallel.pipeline.program import build_program
from engine.parallel.pipeline.schedules import FORWARD_ONLY, Action, Schedule, build_schedule
from engine.parallel.pipeline.simulate import peak_activations
from engine.parallel.tensor import column_linear
from engine.testing.distributed import run_ranks, world_of
from tests.parallel.late import late_messages
from tests.parallel.live_memory import LiveCalls

TOKENS, HIDDEN, SCALE = 3, 4, 0.5
Parts = list[Callable[[Tensor | None, Tensor, float], Tensor]]


class Toy:
    """A model of layers 2 tanh(x·Wᵀ + b), one a part, of which this rank trains its own.

    Attributes:
        at_completion: gradients at the moment when they were said to be complete.
    """

    def __init__(self, world: World, num_chunks: int, num_microbatches: int) -> None:
        torch.manual_seed(0)  # the same on every rank
        self.world, num_parts = world, world.layout.pp * num_chunks
        self.weights = [torch.randn(HIDDEN, HIDDEN + 1, dtype=torch.float64) for _ in range(num_parts)]
        self.batches = [torch.randn(TOKENS, HIDDEN, dtype=torch.float64) for _ in range(num_microbatches)]
        self.at_completion: list[tuple[str, Tensor]] = []
        self.flow = GradientFlow(self._completed)
        mine = range(world.coords.pp, num_parts, world.layout.pp)
        self.sinks: dict[str, GradientSink] = {}
        self.trained: list[nn.Parameter] = []
        self.parts: Parts = [
            self._part(*_split(self.weights[k]), first=k == 0, last=k == num_parts - 1, name=str(k)) for k in mine
        ]
        self.pipeline = Pipeline(self._parts(), world, self.flow, self.new_boundary)
        self.flow.step += 1

    def _parts(self) -> Parts:
        """As they are run; for tests that look on."""
        return self.parts

    def _completed(self, name: str) -> None:
        self.at_completion.append((name, self.sinks[name].main_grad.clone()))

    def _trained(self, name: str, values: Tensor) -> nn.Parameter:
        self.sinks[name] = GradientSink(name, torch.full_like(values, torch.nan), self.flow)  # of a step before
        self.trained.append(trained_parameter(values.clone(), self.sinks[name]))
        return self.trained[-1]

    def _part(
        self, weight: Tensor, bias: Tensor, *, first: bool, last: bool, name: str
    ) -> Callable[[Tensor | None, Tensor, float], Tensor]:
        weight, bias = self._trained(f"{name}.weight", weight), self._trained(f"{name}.bias", bias)
        sink = self.sinks[f"{name}.weight"]

        def run(x: Tensor | None, batch: Tensor, scale: float) -> Tensor:
            assert (x is None) == first
            out = 2 * column_linear(2 * batch if x is None else x, weight, bias, NO_TP, sink).tanh()
            return scale * (out * batch).sum() if last else out

        return run

    @staticmethod
    def new_boundary() -> Tensor:
        return torch.empty(TOKENS, HIDDEN, dtype=torch.float64)

    def expected(self) -> tuple[Tensor, list[list[Tensor]]]:
        """The loss, and the gradients of this rank's parameters, by a loop over the whole model."""
        parameters = [[part.clone().requires_grad_() for part in _split(weight)] for weight in self.weights]
        loss = torch.zeros((), dtype=torch.float64)
        for batch in self.batches:
            x = 2 * batch
            for weight, bias in parameters:
                x = 2 * (x @ weight.t() + bias).tanh()
            loss = loss + SCALE * (x * batch).sum()
        loss.backward()
        mine = parameters[self.world.coords.pp :: self.world.layout.pp]
        return loss.detach(), [[parameter.grad for parameter in part] for part in mine]


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight[:, :-1].contiguous(), weight[:, -1].contiguous()


class Slow(Toy):
    """Parts take their time, at random."""

    def _parts(self) -> Parts:
        clock = random.Random(self.world.rank)

        def slowed(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *arguments: time.sleep(clock.choice((0, 0.002, 0.01))) or part(*arguments)

        return [slowed(part) for part in self.parts]


def schedules(num_stages: int) -> list[Schedule]:
    chunks = [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), *([("interleaved", 2)] if num_stages > 1 else [])]
    return [build_schedule(name, num_stages, m, v) for name, v in chunks for m in (1, 3, 8)]


def train(world: World, schedule: Schedule, kind: type[Toy]) -> None:
    """Run one schedule, and hold everything it leaves behind against the plain loop."""
    program = check_schedule(schedule)
    toy = kind(world, schedule.num_chunks, schedule.num_microbatches)
    actions: list[Action] = []
    toy.pipeline.observe = lambda action, start, end: actions.append(action) if start <= end else None
    with late_messages():
        total = toy.pipeline.run(program, toy.batches, SCALE)
    loss, gradients = toy.expected()
    assert (total.shape, total.dtype) == ((1,), torch.float32)
    is_last = world.coords.pp == world.layout.pp - 1
    torch.testing.assert_close(total[0].double(), loss if is_last else 0 * loss, rtol=1e-6, atol=1e-6)
    for sink, gradient in zip(toy.sinks.values(), chain.from_iterable(gradients), strict=True):
        torch.testing.assert_close(sink.main_grad, gradient, rtol=1e-12, atol=1e-12)
    assert len(toy.at_completion) == len({name for name, _ in toy.at_completion}) == 2 * schedule.num_chunks
    assert all(torch.equal(toy.sinks[name].main_grad, gradient) for name, gradient in toy.at_completion)
    assert actions == list(schedule.actions[world.coords.pp])
    assert toy.pipeline.peak_in_flight == peak_activations(schedule)[world.coords.pp]


def train_all(num_stages: int) -> None:
    world = world_of(Layout(pp=num_stages))
    for schedule in schedules(num_stages):
        train(world, schedule, Toy)
        if schedule.num_microbatches == 3:
            train(world, schedule, Slow)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_every_schedule_gives_the_gradients_of_the_plain_loop(num_stages):
    run_ranks(num_stages, train_all, num_stages)


def evaluate() -> list[tuple[float, float, int, bool]]:
    world, found = world_of(Layout(pp=2)), []
    for num_chunks in (1, 2):
        toy = Toy(world, num_chunks, 3)
        with late_messages():
            total = toy.pipeline.run(build_program(build_schedule(FORWARD_ONLY, 2, 3, num_chunks)), toy.batches, SCALE)
        touched = any(not sink.main_grad.isnan().all() for sink in toy.sinks.values())
        found.append((total.item(), toy.expected()[0].item(), toy.pipeline.peak_in_flight, touched))
        assert not total.requires_grad
    return found


def test_evaluation_keeps_nothing_for_a_backward():
    for (first, _, *nothing), (last, expected, *still_nothing) in zip(*run_ranks(2, evaluate), strict=True):
        assert first == 0
        assert last == pytest.approx(expected, rel=1e-6)
        assert nothing == still_nothing == [0, False]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("name", "num_chunks"), [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2)])
def test_a_stage_warms_up_alone(name, num_chunks, stage):
    """Without process groups, so that nothing can be sent or received: every gradient arrives, and none is complete."""
    toy = Toy(World(Layout(pp=4), stage, 0, 1, torch.device("cpu")), num_chunks, 1)
    toy.pipeline.observe = lambda *_: pytest.fail("an action of no step")
    toy.pipeline.warm_up(build_program(build_schedule(name, 4, 1, num_chunks)), toy.batches[0])
    assert all(sink.main_grad.isfinite().all() for sink in toy.sinks.values())
    assert toy.at_completion == []
    assert toy.pipeline.peak_in_flight == 0


class Counting(Toy):
    """Follows what every part keeps for its backward."""

    def _parts(self) -> Parts:
        self.live = LiveCalls([*self.batches, *self.trained])
        return [self.live.follow(part) for part in self.parts]


IN_FLIGHT = {("gpipe", 1): [8, 8], ("1f1b", 1): [2, 1], ("zero_bubble", 1): [2, 2], ("interleaved", 2): [5, 3]}


def alive_at_once() -> list[int]:
    world, most = world_of(Layout(pp=2)), []
    for name, num_chunks in IN_FLIGHT:
        toy = Counting(world, num_chunks, 8)
        toy.pipeline.run(build_program(build_schedule(name, 2, 8, num_chunks)), toy.batches, SCALE)
        assert toy.live.alive() == 0
        most.append(toy.live.most)
    return most


def test_no_more_activations_are_alive_than_the_schedule_says():
    """Counted on real tensors: 1F1B holds two microbatches on the first of two stages, and not all eight."""
    assert list(zip(*run_ranks(2, alive_at_once), strict=True)) == [tuple(counts) for counts in IN_FLIGHT.values()]


class _Leave(torch.autograd.Function):
    """A copy in memory that numpy owns, and nothing kept: it is seen when the memory is given back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: np.ndarray) -> Tensor:
        return torch.from_numpy(memory).copy_(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class Leaving(Toy):
    """Follows the memory of the outputs of the first stage; `most` were there at once."""

    most = 0

    def _parts(self) -> Parts:
        self.outputs: list[weakref.ref] = []
        return [self._leaving] if self.world.coords.pp == 0 else self.parts

    def _leaving(self, x: Tensor | None, batch: Tensor, scale: float) -> Tensor:
        memory = np.empty((TOKENS, HIDDEN))
        self.outputs.append(weakref.ref(memory))
        self.most = max(self.most, sum(output() is not None for output in self.outputs))
        return _Leave.apply(self.parts[0](x, batch, scale), memory)


def outputs_at_once() -> list[int]:
    world, most = world_of(Layout(pp=2)), []
    for name in ("gpipe", "1f1b", FORWARD_ONLY):
        toy = Leaving(world, 1, 20)
        toy.pipeline.run(build_program(build_schedule(name, 2, 20)), toy.batches, SCALE)
        assert not any(output() is not None for output in toy.outputs)
        most.append(toy.most)
    return most


def test_an_output_is_let_go_once_it_is_sent():
    """The new one, the one before and four that may not have left; not all twenty."""
    first, _ = run_ranks(2, outputs_at_once)
    assert all(1 <= most <= 6 for most in first)


class Broken(Toy):
    """The last part fails in its last microbatch."""

    def _parts(self) -> Parts:
        def fail(*arguments: Any) -> Tensor:
            if arguments[1] is self.batches[-1]:
                raise ValueError("broken on purpose")
            return self.parts[0](*arguments)

        return [fail] if self.world.coords.pp == self.world.layout.pp - 1 else self.parts


def fail(num_stages: int) -> None:
    world = world_of(Layout(pp=num_stages))
    toy = Broken(world, 1, 3)
    toy.pipeline.run(build_program(build_schedule(FORWARD_ONLY, num_stages, 3)), toy.batches)


def test_an_error_in_a_part_comes_out():
    with pytest.raises(ValueError, match="broken on purpose"):
        fail(1)
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1 failed.*broken on purpose"):
        run_ranks(2, fail, 2)

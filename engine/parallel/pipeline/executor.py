"""Runs any pipeline schedule on one rank.

The program of a stage (`program.py`) says what to post, compute and send, and in which order. A sent tensor is freed as
soon as its send is complete. Parts of the model are plain functions, so the executor knows nothing of models.
Alternative considered:
`torch.distributed.pipelining`, whose stages own the model, its shapes and the splitting of the backward pass.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.parallel.gradients import GradientFlow
from engine.parallel.layout import World
from engine.parallel.pipeline.program import Program, StepKind
from engine.parallel.pipeline.schedules import Action, ActionKind

B = TypeVar("B")
# With more sends in flight, wait for the oldest: gloo reports a send as complete only after wait(). Waiting cannot
# deadlock: `check_program` has proved that for a wait at every single send.
_MAX_SENDS_IN_FLIGHT = 4

Observe = Callable[[Action, float, float], None]


@dataclass
class InFlight:
    """A microbatch in a part of the model, between its forward and its backward pass.

    `inputs` is None where the part embeds tokens; `weight_grads` are the postponed weight-gradient matmuls.
    """

    inputs: Tensor | None
    result: GradientEdge
    weight_grads: list[Callable[[], None]] | None = None


class Pipeline(Generic[B]):
    """This rank's parts of the model, ready to run schedules.

    Attributes:
        peak_in_flight: most (microbatch, part) pairs so far whose activations were alive at once.
        current: the action that is under way, or whose messages are; None outside of schedules.
        observe: called with each action and when it started and ended, in seconds; the waiting before it not included.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[Tensor | None, B, float], Tensor]],
        world: World,
        flow: GradientFlow,
        new_boundary: Callable[[], Tensor],
    ) -> None:
        """Prepare to run schedules on this stage.

        Args:
            parts: for each chunk a function of hidden states (None in the first part of the model), a microbatch and
                the factor of the loss; it returns hidden states, or in the last part of the model the summed loss times
                the factor.
            flow: tracks the progress of the backward pass.
            new_boundary: makes an empty tensor for the hidden states that travel between parts.
        """
        self.parts = parts
        self.world = world
        self.flow = flow
        self.new_boundary = new_boundary
        self.peak_in_flight = 0
        self.current: Action | None = None
        self.observe: Observe | None = None

    def begin(self, action: Action | None) -> None:
        """Note the action that is under way; None at the end of a schedule."""
        if action is not self.current:
            self.current, stage = action, self.world.coords.pp
            text, kind = ("", "") if action is None else (f"pipeline stage {stage}, {action}", action.kind.name)
            self.world.activity.act(text, kind)

    def run(self, program: Program, microbatches: Sequence[B], scale: float = 1.0) -> Tensor:
        """Run this stage's `program`; where it trains, the gradients of `scale` times the summed loss are added up.

        Returns:
            The summed loss of all microbatches times `scale`, fp32 [1]; 0 on stages without the last part.
        """
        with torch.set_grad_enabled(program.schedule.trains):
            return _Run(self, program, microbatches, scale).execute()

    def warm_up(self, program: Program, microbatch: B) -> None:
        """Compute this stage's actions of `program`, which has one microbatch, with nothing sent or received.

        Constants stand in for messages. No gradient counts as complete, so none is reduced; the caller discards them.
        """
        peak = self.peak_in_flight
        with torch.set_grad_enabled(program.schedule.trains):
            run = _Run(self, program, [microbatch], 1.0)
            run.last_of.clear()
            for action in program.schedule.actions[run.stage]:
                receives = program.schedule.source(run.stage, action) is not None
                run.result_of(action, self.new_boundary().fill_(0.01) if receives else None)
        self.peak_in_flight = peak


class _Run(Generic[B]):
    """One execution of a program."""

    def __init__(self, pipeline: Pipeline[B], program: Program, microbatches: Sequence[B], scale: float) -> None:
        self.pipeline, self.schedule, self.microbatches, self.scale = pipeline, program.schedule, microbatches, scale
        world = pipeline.world
        self.stage = world.coords.pp
        self.ranks = world.layout.peers(world.rank, "pp")
        self.steps = program.steps[self.stage]
        actions = self.schedule.actions[self.stage]
        self.last_of = {(action.kind, action.chunk): action for action in actions}
        self.receives: dict[Action, tuple[Tensor, dist.Work]] = {}  # posted and not waited for, by what needs them
        self.results: dict[Action, Tensor] = {}  # computed and not sent
        self.sends: list[tuple[Tensor, dist.Work]] = []  # not known to have left
        self.in_flight: dict[tuple[int, int], InFlight] = {}
        self.total = torch.zeros(1, device=world.device)

    def execute(self) -> Tensor:
        do = {StepKind.RECEIVE: self._post_receive, StepKind.COMPUTE: self._compute, StepKind.SEND: self._send}
        for step in self.steps:
            self.pipeline.begin(step.action)
            do[step.kind](step.action)
        for _, work in self.sends:
            work.wait()
        self.pipeline.begin(None)
        return self.total

    def _post_receive(self, action: Action) -> None:
        source = self.schedule.source(self.stage, action)
        assert source is not None
        tensor = self.pipeline.new_boundary()
        work = dist.irecv(tensor, self.ranks[source[0]], self._channel(action, source[0], self.stage))
        assert work is not None
        self.receives[action] = (tensor, work)

    def _send(self, action: Action) -> None:
        target = self.schedule.target(self.stage, action)
        assert target is not None
        tensor, channel = self.results.pop(action), self._channel(action, self.stage, target[0])
        work = dist.isend(tensor, self.ranks[target[0]], channel)
        assert work is not None
        self.sends.append((tensor, work))
        self.sends = [(tensor, work) for tensor, work in self.sends if not work.is_completed()]
        while len(self.sends) > _MAX_SENDS_IN_FLIGHT:
            self.sends.pop(0)[1].wait()

    def _channel(self, action: Action, source: int, target: int) -> dist.ProcessGroup:
        forward = action.kind is ActionKind.FORWARD
        wraps = (target < source) if forward else (target > source)
        return self.pipeline.world.channels[("forward" if forward else "backward") + (" wrap" if wraps else "")]

    def _compute(self, action: Action) -> None:
        """Wait for the message that the action needs, if any, and run it."""
        message = None
        if action in self.receives:
            message, work = self.receives.pop(action)
            work.wait()
        started = time.perf_counter()
        result = self.result_of(action, message)
        if self.pipeline.observe is not None:
            self.pipeline.observe(action, started, time.perf_counter())
        if result is not None and self.schedule.target(self.stage, action) is not None:
            self.results[action] = result

    def result_of(self, action: Action, message: Tensor | None) -> Tensor | None:
        """Run the action on the message that it needs; return what another stage may need, or None."""
        if action.kind is ActionKind.FORWARD:
            return self._forward(action, message)
        return self._backward_pass(action, message)

    def _backward_pass(self, action: Action, grad: Tensor | None) -> Tensor | None:
        """Run a backward action, or a part of one; return the gradient to send, or None."""
        place, flow = (action.microbatch, action.chunk), self.pipeline.flow
        flow.is_last_pass = self.last_of.get((action.kind, action.chunk)) == action
        result = None
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            weight_grads = self.in_flight.pop(place).weight_grads
            assert weight_grads is not None
            for matmul in weight_grads:
                matmul()
        else:
            flow.postponed = [] if action.kind is ActionKind.BACKWARD_INPUT else None
            result = self._backward(place, grad, flow)
        flow.is_last_pass = False
        return result

    def _forward(self, action: Action, message: Tensor | None) -> Tensor:
        if message is not None and self.schedule.trains:
            message.requires_grad_()
        result = self.pipeline.parts[action.chunk](message, self.microbatches[action.microbatch], self.scale)
        if self.schedule.target(self.stage, action) is None:
            self.total += result.detach()
        if self.schedule.trains:
            self.in_flight[action.microbatch, action.chunk] = InFlight(message, get_gradient_edge(result))
            self.pipeline.peak_in_flight = max(self.pipeline.peak_in_flight, len(self.in_flight))
        return result.detach()

    def _backward(self, place: tuple[int, int], grad: Tensor | None, flow: GradientFlow) -> Tensor | None:
        passing = self.in_flight.pop(place)
        torch.autograd.backward((passing.result,), (grad,))
        if flow.postponed is not None:
            self.in_flight[place] = InFlight(None, passing.result, flow.postponed)
            flow.postponed = None
        return None if passing.inputs is None else passing.inputs.grad

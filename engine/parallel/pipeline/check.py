"""The proof that a pipeline schedule runs, and what it costs: time, bubble, activations in flight.

`check` holds the order of actions against the rules of communication, without tensors or processes. What it proves
holds for all timings: a step that can be taken stays possible until it is taken, so if one order of events gets
through, all do. Alternative considered: trusting the functions that build schedules; a wrong order would show up as a
hang of the cluster.

Communication as `check` assumes it and the executor does it:
- A channel is (sending stage, receiving stage, forward or backward). Its messages arrive in the order they were sent.
- A send holds its stage until the receiver has posted the receive (rendezvous), as large messages do in NCCL and gloo.
- Before a stage waits for a send, it has posted the receives of its next `LOOKAHEAD` actions that need one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate

from engine.errors import ConfigError
from engine.parallel.pipeline.schedules import FORWARD_ONLY, Action, ActionKind, Schedule

LOOKAHEAD = 2  # 1 is enough for all but `interleaved`, whose stages need a B, then an F, while the ring passes on Fs

Channel = tuple[int, int, bool]  # sending stage, receiving stage, whether it carries forwards


class ScheduleError(ConfigError):
    """A schedule that cannot run: at which stage and action, and why."""

    advice = "choose another parallel.schedule; this one has a fault"

    def __init__(self, schedule: Schedule, stage: int, action: Action, reason: str) -> None:
        super().__init__(f"schedule {schedule.name}: stage {stage}, {action}: {reason}")
        self.stage = stage
        self.action = action


@dataclass(frozen=True)
class Costs:
    """Time of one microbatch through all chunks of a stage, in any unit, and the latency of a send between stages."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    send: float = 0.0

    def of(self, kind: ActionKind) -> float:
        whole = self.backward_input + self.backward_weight
        costs = {"F": self.forward, "B": whole, "I": self.backward_input, "W": self.backward_weight}
        return costs[kind.value]


@dataclass(frozen=True)
class TimedAction:
    """When an action runs."""

    action: Action
    start: float
    end: float


Timeline = tuple[tuple[TimedAction, ...], ...]  # per stage
UNIT_COSTS = Costs()


def check_schedule(schedule: Schedule) -> None:
    """Prove that `schedule` runs to its end and computes everything once.

    Every stage does every action exactly once, and in an order that its own results allow; no action waits for ever for
    another stage; the messages of a channel are needed in the order in which they are sent; rendezvous sends do not
    deadlock.

    Raises:
        ScheduleError: names the stage, the action and the reason.
    """
    assert len(schedule.actions) == schedule.num_stages
    for stage in range(schedule.num_stages):
        _check_complete(schedule, stage)
        _check_order(schedule, stage)
    simulate(schedule)
    _check_channels(schedule)
    _check_rendezvous(schedule)


def simulate(schedule: Schedule, costs: Costs = UNIT_COSTS) -> Timeline:
    """When each action runs if it starts as soon as its stage is free and what it needs from others is there.

    A chunk costs 1/num_chunks of its stage. A send arrives `costs.send` later and does not hold the sender.

    Raises:
        ScheduleError: actions of several stages wait for each other.
    """
    stages = range(schedule.num_stages)
    spans: list[list[TimedAction]] = [[] for _ in stages]
    arrivals: dict[tuple[int, int, int, bool], float] = {}  # of (stage, chunk, microbatch, is forward)
    while sum(_advance(schedule, costs, stage, spans[stage], arrivals) for stage in stages):
        pass
    waits = {}
    for stage in stages:
        if len(spans[stage]) < len(schedule.actions[stage]):
            action = schedule.actions[stage][len(spans[stage])]
            source = schedule.source(stage, action)
            assert source is not None
            waits[stage] = (action, "needs a result of", source[0])
    if waits:
        raise _deadlock(schedule, waits)
    return tuple(map(tuple, spans))


def bubble_fraction(timeline: Timeline) -> float:
    """Idle time over ideal time, as in the papers on schedules: (makespan − busy) / busy.

    `busy` is the computing time of a stage (of the mean one, should they differ): what the step would take without
    idling. 0 means no idle stage; GPipe with p stages and m microbatches has (p − 1)/m.
    """
    spans = [span for stage in timeline for span in stage]
    busy = sum(span.end - span.start for span in spans) / len(timeline)
    makespan = max(span.end for span in spans) - min(span.start for span in spans)
    return (makespan - busy) / busy


def peak_activations(schedule: Schedule) -> list[int]:
    """Per stage the most (microbatch, chunk) whose forward is done and whose backward (W where split) is not.

    Each holds the activations of 1/num_chunks of the stage's layers. 0 for `forward_only`, which keeps nothing.
    """
    if not schedule.trains:
        return [0] * schedule.num_stages
    change = {
        ActionKind.FORWARD: 1,
        ActionKind.BACKWARD: -1,
        ActionKind.BACKWARD_INPUT: 0,
        ActionKind.BACKWARD_WEIGHT: -1,
    }
    return [max(accumulate(change[action.kind] for action in actions)) for actions in schedule.actions]


def _advance(
    schedule: Schedule,
    costs: Costs,
    stage: int,
    spans: list[TimedAction],
    arrivals: dict[tuple[int, int, int, bool], float],
) -> int:
    """Run the actions of a stage up to the first whose input has not been computed; how many were run."""
    before = len(spans)
    for action in schedule.actions[stage][before:]:
        forward = action.kind is ActionKind.FORWARD
        start = spans[-1].end if spans else 0.0
        if source := schedule.source(stage, action):
            arrival = arrivals.get((*source, action.microbatch, forward))
            if arrival is None:
                break
            start = max(start, arrival + (costs.send if source[0] != stage else 0.0))
        spans.append(TimedAction(action, start, start + costs.of(action.kind) / schedule.num_chunks))
        if action.kind is not ActionKind.BACKWARD_WEIGHT:
            arrivals[stage, action.chunk, action.microbatch, forward] = spans[-1].end
    return len(spans) - before


def _check_complete(schedule: Schedule, stage: int) -> None:
    """Nothing unknown, nothing twice, nothing missing, nothing too much."""
    counts = Counter(schedule.actions[stage])
    last, last_chunk = schedule.num_microbatches - 1, schedule.num_chunks - 1
    for action, count in counts.items():
        if not (0 <= action.microbatch <= last and 0 <= action.chunk <= last_chunk):
            raise ScheduleError(
                schedule, stage, action, f"unknown; microbatches are 0 to {last}, chunks 0 to {last_chunk}"
            )
        if count > 1:
            raise ScheduleError(schedule, stage, action, f"done {count} times")
    wanted = _wanted(schedule, counts)
    for action in wanted:
        if action not in counts:
            raise ScheduleError(schedule, stage, action, "missing")
    if extra := counts.keys() - set(wanted):
        reason = f"one too many; a backward is either B, or I and W, and {FORWARD_ONLY} has none"
        raise ScheduleError(schedule, stage, min(extra, key=str), reason)


def _wanted(schedule: Schedule, counts: Counter[Action]) -> list[Action]:
    """What a stage has to do, given which of its backwards it splits."""
    wanted = []
    for microbatch in range(schedule.num_microbatches):
        for chunk in range(schedule.num_chunks):
            parts = [
                Action(kind, microbatch, chunk) for kind in (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
            ]
            backward = (
                parts if any(part in counts for part in parts) else [Action(ActionKind.BACKWARD, microbatch, chunk)]
            )
            wanted += [Action(ActionKind.FORWARD, microbatch, chunk), *(backward if schedule.trains else ())]
    return wanted


def _check_order(schedule: Schedule, stage: int) -> None:
    """Backward after forward, and weight gradients after input gradients."""
    needs = {
        ActionKind.BACKWARD: ActionKind.FORWARD,
        ActionKind.BACKWARD_INPUT: ActionKind.FORWARD,
        ActionKind.BACKWARD_WEIGHT: ActionKind.BACKWARD_INPUT,
    }
    done = set()
    for action in schedule.actions[stage]:
        if action.kind in needs:
            needed = Action(needs[action.kind], action.microbatch, action.chunk)
            if needed not in done:
                raise ScheduleError(schedule, stage, action, f"comes before {needed}, which it needs")
        done.add(action)


def _incoming(schedule: Schedule, stage: int, action: Action) -> Channel | None:
    """The channel on which `action` receives what it needs, if from another stage."""
    source = schedule.source(stage, action)
    return None if source is None or source[0] == stage else (source[0], stage, action.kind is ActionKind.FORWARD)


def _outgoing(schedule: Schedule, stage: int, action: Action) -> Channel | None:
    """The channel on which the result of `action` is sent, if to another stage."""
    target = schedule.target(stage, action)
    return None if target is None or target[0] == stage else (stage, target[0], action.kind is ActionKind.FORWARD)


def _check_channels(schedule: Schedule) -> None:
    """The order in which each channel's messages are needed is the order in which they are sent."""
    sent: dict[Channel, list[tuple[int, int]]] = defaultdict(list)  # (microbatch, chunk of the receiver)
    needed: dict[Channel, list[Action]] = defaultdict(list)
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            if channel := _outgoing(schedule, stage, action):
                target = schedule.target(stage, action)
                assert target is not None
                sent[channel].append((action.microbatch, target[1]))
            if channel := _incoming(schedule, stage, action):
                needed[channel].append(action)
    for channel, receivers in needed.items():
        for (microbatch, chunk), action in zip(sent[channel], receivers, strict=True):
            if (microbatch, chunk) != (action.microbatch, action.chunk):
                first = Action(action.kind, microbatch, chunk)
                reason = f"comes before {first}, but stage {channel[0]} sends it the input of {first} first"
                raise ScheduleError(schedule, channel[1], action, reason)


class _Step(Enum):
    """What a stage does on a channel; the n-th TAKE needs the n-th GIVE, and that the n-th POST."""

    POST = auto()  # a receive
    TAKE = auto()  # wait until the message is there
    GIVE = auto()  # send, and wait until the receive is posted


def _check_rendezvous(schedule: Schedule) -> None:
    """Take every stage's steps in turn, as far as each can go; all have to get to their end."""
    programs = [list(_steps(schedule, stage)) for stage in range(schedule.num_stages)]
    passed: Counter[tuple[_Step, Channel]] = Counter()
    before, done = None, [0] * schedule.num_stages
    while done != before:
        before = done
        done = [_step_on(program, first, passed) for program, first in zip(programs, done, strict=True)]
    waits = {}
    for stage, program in enumerate(programs):
        if done[stage] < len(program):
            step, (sender, receiver, _), action = program[done[stage]]
            gives = step is _Step.GIVE
            waits[stage] = (action, "sends its result to", receiver) if gives else (action, "receives from", sender)
    if waits:
        raise _deadlock(schedule, waits)


def _steps(schedule: Schedule, stage: int) -> Iterator[tuple[_Step, Channel, Action]]:
    """The communication of a stage, in order, each with the action that it belongs to."""
    actions = schedule.actions[stage]
    needs = [channel for action in actions if (channel := _incoming(schedule, stage, action))]
    posted = taken = 0
    for action in actions:
        channel = _incoming(schedule, stage, action)
        if channel and posted == taken:
            yield _Step.POST, channel, action
            posted += 1
        if channel:
            yield _Step.TAKE, channel, action
            taken += 1
        for ahead in needs[posted : taken + LOOKAHEAD]:
            yield _Step.POST, ahead, action
            posted += 1
        if outgoing := _outgoing(schedule, stage, action):
            yield _Step.GIVE, outgoing, action


def _step_on(program: list[tuple[_Step, Channel, Action]], first: int, passed: Counter[tuple[_Step, Channel]]) -> int:
    """Take the steps of a stage from number `first` on, up to one that has to wait; that one's number."""
    needs = {_Step.TAKE: _Step.GIVE, _Step.GIVE: _Step.POST}
    for number in range(first, len(program)):
        step, channel, _ = program[number]
        if step in needs and passed[needs[step], channel] <= passed[step, channel]:
            return number
        passed[step, channel] += 1
    return len(program)


def _deadlock(schedule: Schedule, waits: dict[int, tuple[Action, str, int]]) -> ScheduleError:
    """The error for stages that cannot go on; `waits` has what each does, and with which other stage."""
    stage = min(waits)
    chain: list[int] = []
    while stage in waits and stage not in chain:
        chain.append(stage)
        stage = waits[stage][2]
    cycle = chain[chain.index(stage) :] if stage in chain else chain
    parts = [f"stage {s}, {waits[s][0]} {waits[s][1]} stage {waits[s][2]}" for s in cycle]
    return ScheduleError(schedule, cycle[0], waits[cycle[0]][0], f"deadlock: {'; '.join(parts)}")

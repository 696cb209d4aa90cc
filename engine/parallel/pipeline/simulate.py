"""When each action of a schedule runs: simulated timelines, the bubble, and activations in flight.

Alternative considered: formulas from the papers, which hold for one schedule each and for equal costs only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.parallel.pipeline.schedules import Action, ActionKind, Schedule, deadlock


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


def simulate(
    schedule: Schedule, costs: Costs = UNIT_COSTS, posted_after: Sequence[Mapping[Action, int]] | None = None
) -> Timeline:
    """When each action runs if it starts as soon as its stage is free and what it needs from others is there.

    A chunk costs 1/num_chunks of its stage. A message arrives `costs.send` after it is sent and its receive is posted,
    and does not hold the sender.

    Args:
        posted_after: per stage, for each action that receives, how many actions come before its receive is posted; None
            if all are posted from the start.

    Raises:
        ScheduleError: actions of several stages wait for each other.
    """
    stages = range(schedule.num_stages)
    spans: list[list[TimedAction]] = [[] for _ in stages]
    arrivals: dict[tuple[int, int, int, bool], float] = {}  # of (stage, chunk, microbatch, is forward)
    posted = posted_after or [{} for _ in stages]
    while sum(_advance(schedule, costs, stage, spans[stage], arrivals, posted[stage]) for stage in stages):
        pass
    waits = {}
    for stage in stages:
        if len(spans[stage]) < len(schedule.actions[stage]):
            action = schedule.actions[stage][len(spans[stage])]
            source = schedule.source(stage, action)
            assert source is not None
            waits[stage] = (action, "needs a result of", source[0])
    if waits:
        raise deadlock(schedule, waits)
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
    posted_after: Mapping[Action, int],
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
            first = posted_after.get(action, 0)
            posted = spans[first - 1].end if first else 0.0
            start = max(start, max(arrival, posted) + costs.send if source[0] != stage else arrival)
        spans.append(TimedAction(action, start, start + costs.of(action.kind) / schedule.num_chunks))
        if action.kind is not ActionKind.BACKWARD_WEIGHT:
            arrivals[stage, action.chunk, action.microbatch, forward] = spans[-1].end
    return len(spans) - before

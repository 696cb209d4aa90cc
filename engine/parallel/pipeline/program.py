"""The program of each stage: its actions with their sends and receives, in the order in which the host launches them.

The rule for messages: sort all actions of all stages by the time at which they end, in the timeline with equal costs. A
message is exchanged right after the action that makes it: the sender sends it before its next action, and the receiver
posts the receive before its own first action that ends later. So

- no receive is posted later than its message is sent in that timeline, and the transfer overlaps with compute;
- the programs of all stages follow one common order. If every send and receive blocked where it is launched, the first
  message of that order that is not complete would be the next step of both its stages. Blocking less, as a GPU does
  while the host runs ahead, only removes waits. So no message can hang, whatever the hosts wait for in between.

The second property is what a GPU needs: a posted receive is a kernel that spins until its sender comes, and a host that
has to wait for the device (a kernel's first use, memory that is freed) waits for that receive as well.
Alternatives considered: posting the next n receives, whatever they depend on (two stages then wait for each other as
soon as a host waits for its device), and posting what depends on nothing that this stage has still to do (safe if one
host waits, not if two neighbors do; over 1F1B both directions cannot be posted an action ahead without that risk).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate

from engine.parallel.pipeline.schedules import Action, ActionKind, Schedule
from engine.parallel.pipeline.simulate import Timeline, simulate


class StepKind(Enum):
    """What the host launches: the receive that an action needs, the action, or the send of its result."""

    RECEIVE = auto()
    COMPUTE = auto()
    SEND = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """One launch; `action` is what needs the received message, what is computed, or whose result is sent."""

    kind: StepKind
    action: Action

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.action}"


@dataclass(frozen=True)
class Program:
    """What each stage launches, in order: `steps[stage]`. An action waits for its own message, and for nothing else."""

    schedule: Schedule
    steps: tuple[tuple[Step, ...], ...]

    @property
    def posted_after(self) -> list[dict[Action, int]]:
        """Per stage, for each action that receives, how many actions come before its receive is posted."""
        found: list[dict[Action, int]] = []
        for steps in self.steps:
            computed = accumulate(step.kind is StepKind.COMPUTE for step in steps)
            receives = zip(steps, computed, strict=True)
            found.append({step.action: count for step, count in receives if step.kind is StepKind.RECEIVE})
        return found

    @property
    def receives_ahead(self) -> float:
        """Fraction of the receives that are posted at least one action before the one that needs them; 1 if none."""
        pairs = list(zip(self.posted_after, self.schedule.actions, strict=True))
        ahead = sum(posted.get(a, i) < i for posted, actions in pairs for i, a in enumerate(actions))
        total = sum(len(posted) for posted, _ in pairs)
        return ahead / total if total else 1.0


def build_program(schedule: Schedule) -> Program:
    """Place the messages of a schedule.

    Where two actions end at the same time, either may come first; of forwards first and backwards first this takes
    what posts more receives ahead.

    Raises:
        ScheduleError: actions of several stages wait for each other.
    """
    timeline = simulate(schedule)
    programs = (_place_messages(schedule, timeline, first) for first in (True, False))
    return max(programs, key=lambda program: program.receives_ahead)


@dataclass(frozen=True)
class PostedReceive:
    """When a receive is posted in a timeline (as the action before it ends), and when the action needs its message."""

    action: Action
    posted: float
    needed: float


def posted_receives(program: Program, timeline: Timeline) -> tuple[tuple[PostedReceive, ...], ...]:
    """Per stage its receives in the order in which they are posted, in a timeline of the program's schedule."""
    found = []
    for posted_after, spans in zip(program.posted_after, timeline, strict=True):
        needed, ends = {span.action: span.start for span in spans}, [0.0, *(span.end for span in spans)]
        found.append(tuple(PostedReceive(action, ends[n], needed[action]) for action, n in posted_after.items()))
    return tuple(found)


def _place_messages(schedule: Schedule, timeline: Timeline, forwards_first: bool) -> Program:
    needs = [{_message(action): action for action in actions} for actions in schedule.actions]
    steps: list[list[Step]] = [[] for _ in timeline]
    for stage, action in _by_end(timeline, forwards_first):
        steps[stage].append(Step(StepKind.COMPUTE, action))
        target = schedule.target(stage, action)
        if target is not None and target[0] != stage:
            steps[stage].append(Step(StepKind.SEND, action))
            receiver = needs[target[0]][action.kind is ActionKind.FORWARD, action.microbatch, target[1]]
            steps[target[0]].append(Step(StepKind.RECEIVE, receiver))
    return Program(schedule, tuple(map(tuple, steps)))


def _message(action: Action) -> tuple[bool, int, int] | None:
    """(is forward, microbatch, chunk): what identifies the message that an action receives on its stage."""
    if action.kind is ActionKind.BACKWARD_WEIGHT:
        return None
    return action.kind is ActionKind.FORWARD, action.microbatch, action.chunk


def _by_end(timeline: Timeline, forwards_first: bool) -> Iterator[tuple[int, Action]]:
    """(stage, action) by end. Among equals, one direction first, and in it senders before receivers."""
    ends: dict[int, list[tuple[bool, int, Action]]] = defaultdict(list)
    for stage, spans in enumerate(timeline):
        for span in spans:
            forward = span.action.kind is ActionKind.FORWARD
            ends[round(span.end * 1_000_000)].append(
                (forward != forwards_first, stage if forward else -stage, span.action)
            )
    for end in sorted(ends):
        for _, place, action in sorted(ends[end], key=lambda entry: entry[:2]):
            yield abs(place), action

"""Pipeline schedules as data: which stage computes what, and in which order.

A schedule is a value: for each stage a tuple of actions in execution order. It says nothing about sends, receives or
tensors, because these follow from the order, so that one checker proves, one executor runs and one plot draws any of
them, and a new schedule is a new function. Alternative considered: schedules as loops of computation and
communication calls, in which the order can only be seen by running it.

Stages and chunks: stage s holds `num_chunks` parts of the model. Chunk c of stage s is virtual stage
`c * num_stages + s` (round robin, Narayanan et al. 2021), so every virtual stage sends its result to the next stage in
the ring. Forward m of a virtual stage needs forward m of the one before; backward m needs forward m of its own and
backward m of the one after.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain

from engine.errors import ConfigError


class ActionKind(Enum):
    """What an action computes; a backward is done in one (B), or in two parts (I, then W)."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of a stage on one microbatch."""

    kind: ActionKind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Schedule:
    """The actions of every stage, in execution order: `actions[stage]`."""

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def trains(self) -> bool:
        """Whether every forward has a backward."""
        return self.name != FORWARD_ONLY

    def source(self, stage: int, action: Action) -> tuple[int, int] | None:
        """(stage, chunk) whose result for the same microbatch `action` needs; None if the stage itself has it all."""
        return self._neighbor(stage, action, -1 if action.kind is ActionKind.FORWARD else 1)

    def target(self, stage: int, action: Action) -> tuple[int, int] | None:
        """(stage, chunk) that needs the result of `action`; None where it stays."""
        return self._neighbor(stage, action, 1 if action.kind is ActionKind.FORWARD else -1)

    def _neighbor(self, stage: int, action: Action, step: int) -> tuple[int, int] | None:
        virtual_stage = action.chunk * self.num_stages + stage + step
        if action.kind is ActionKind.BACKWARD_WEIGHT or not 0 <= virtual_stage < self.num_stages * self.num_chunks:
            return None
        chunk, neighbor = divmod(virtual_stage, self.num_stages)
        return neighbor, chunk


class ScheduleError(ConfigError):
    """A schedule that cannot run: at which stage and action, and why."""

    advice = "choose another parallel.schedule; this one has a fault"

    def __init__(self, schedule: Schedule, stage: int, action: Action, reason: str) -> None:
        super().__init__(f"schedule {schedule.name}: stage {stage}, {action}: {reason}")
        self.stage = stage
        self.action = action


def deadlock(schedule: Schedule, waits: dict[int, tuple[Action, str, int]]) -> ScheduleError:
    """The error for stages that cannot go on; `waits` has what each does, and with which other stage."""
    stage = min(waits)
    chain: list[int] = []
    while stage in waits and stage not in chain:
        chain.append(stage)
        stage = waits[stage][2]
    cycle = chain[chain.index(stage) :] if stage in chain else chain
    parts = [f"stage {s}, {waits[s][0]} {waits[s][1]} stage {waits[s][2]}" for s in cycle]
    return ScheduleError(schedule, cycle[0], waits[cycle[0]][0], f"deadlock: {'; '.join(parts)}")


def build_schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The schedule called `name`: one of `SCHEDULES`, or `forward_only` for evaluation.

    Raises:
        ConfigError: no such schedule, or one that does not admit these numbers.
    """
    if name not in _BUILDERS:
        raise ConfigError(f"parallel.schedule = {name}; expected one of {', '.join(SCHEDULES)}")
    sizes = {
        "parallel.pp": num_stages,
        "parallel.virtual_stages": num_chunks,
        "number of microbatches": num_microbatches,
    }
    for setting, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{setting} = {value}; a pipeline needs at least 1")
    _check_chunks(name, num_chunks)
    actions = tuple(
        tuple(_BUILDERS[name](num_stages, stage, num_microbatches, num_chunks)) for stage in range(num_stages)
    )
    return Schedule(name, num_stages, num_microbatches, num_chunks, actions)


def _gpipe(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> Iterator[Action]:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965).

    Bubble (p − 1)/m of the ideal time; every microbatch is in flight at once.
    """
    for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
        yield from (Action(kind, microbatch) for microbatch in range(num_microbatches))


def _one_f_one_b(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> Iterator[Action]:
    """As many forwards as there are stages below, then one forward and one backward in turn (Narayanan et al. 2021).

    Bubble (p − 1)/m of the ideal time; at most `num_stages - stage` microbatches in flight.
    """
    forwards = [Action(ActionKind.FORWARD, microbatch) for microbatch in range(num_microbatches)]
    backwards = [(Action(ActionKind.BACKWARD, microbatch),) for microbatch in range(num_microbatches)]
    return _in_turn(forwards, backwards, warmup=num_stages - 1 - stage)


def _interleaved(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> Iterator[Action]:
    """1F1B over several chunks per stage (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Bubble (p − 1)/(v·m) of the ideal time; at most `2 * (p - 1 - stage) + (v - 1) * p + 1` chunks in flight, which on
    stage 0 is 1 + (p − 1)/(p·v) of one microbatch in all layers (Korthikanti et al. 2022, arXiv 2205.05198).
    The paper asks for a multiple of p microbatches. Any other number takes the order of the next multiple without its
    first microbatches: no more in flight, and no slower than that multiple.
    """
    order = _chunk_order(num_stages, num_microbatches, num_chunks)
    forwards = [Action(ActionKind.FORWARD, microbatch, chunk) for microbatch, chunk in order]
    backwards = [(Action(ActionKind.BACKWARD, microbatch, num_chunks - 1 - chunk),) for microbatch, chunk in order]
    actions = _in_turn(forwards, backwards, warmup=2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages)
    return (action for action in actions if action.microbatch >= 0)


def _zero_bubble(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> Iterator[Action]:
    """ZB-H1 (Qi et al. 2024, arXiv 2401.10241, section 2): 1F1B whose weight gradients wait `stage` microbatches.

    Later stages have fewer forwards in flight; what waits makes them hold as much as stage 0, p microbatches. It lets
    the input gradients run ahead, and fills the end, where 1F1B idles. The bubble is the paper's
    (p − 1)(T_F + T_B − T_W), with T_B for the input gradient, exactly when m >= p and neither T_F nor T_B is below T_W;
    with m < p microbatches it is (p − m)·T_W more.
    """
    forwards = [Action(ActionKind.FORWARD, microbatch) for microbatch in range(num_microbatches)]
    weights: list[tuple[Action, ...]] = [()] * stage
    weights += [(Action(ActionKind.BACKWARD_WEIGHT, microbatch),) for microbatch in range(num_microbatches)]
    backwards = [
        (Action(ActionKind.BACKWARD_INPUT, microbatch), *weights[microbatch]) for microbatch in range(num_microbatches)
    ]
    left = chain.from_iterable(weights[num_microbatches:])
    return chain(_in_turn(forwards, backwards, warmup=num_stages - 1 - stage), left)


def _forward_only(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> Iterator[Action]:
    """The forwards in the order of the interleaved schedule, for evaluation."""
    order = _chunk_order(num_stages, num_microbatches, num_chunks)
    return (Action(ActionKind.FORWARD, microbatch, chunk) for microbatch, chunk in order if microbatch >= 0)


def _in_turn(forwards: Sequence[Action], backwards: Sequence[tuple[Action, ...]], warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    yield from forwards[:warmup]
    for number, backward in enumerate(backwards):
        yield from forwards[warmup + number : warmup + number + 1]
        yield from backward


def _chunk_order(num_stages: int, num_microbatches: int, num_chunks: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) in the order of the forwards: `num_stages` microbatches through all chunks, then the next.

    A group as long as the ring keeps it busy: its first microbatch comes back when its last has left. The first group
    is filled up with microbatches below 0, which do not exist; at the start the ring idles anyway.
    """
    return [
        (microbatch, chunk)
        for first in range(-(-num_microbatches % num_stages), num_microbatches, num_stages)
        for chunk in range(num_chunks)
        for microbatch in range(first, first + num_stages)
    ]


def _check_chunks(name: str, num_chunks: int) -> None:
    if name == INTERLEAVED and num_chunks < 2:
        raise ConfigError(
            f"parallel.virtual_stages = {num_chunks} with parallel.schedule = interleaved; it needs at least 2 chunks "
            "per stage: raise parallel.virtual_stages, or choose parallel.schedule = 1f1b"
        )
    if name not in (INTERLEAVED, FORWARD_ONLY) and num_chunks != 1:
        raise ConfigError(
            f"parallel.virtual_stages = {num_chunks} with parallel.schedule = {name}, which has one chunk per stage: "
            "set parallel.virtual_stages = 1, or choose parallel.schedule = interleaved"
        )


INTERLEAVED = "interleaved"
FORWARD_ONLY = "forward_only"
_BUILDERS: dict[str, Callable[[int, int, int, int], Iterator[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    INTERLEAVED: _interleaved,
    "zero_bubble": _zero_bubble,
    FORWARD_ONLY: _forward_only,
}
SCHEDULES = tuple(name for name in _BUILDERS if name != FORWARD_ONLY)  # what a user may choose for training

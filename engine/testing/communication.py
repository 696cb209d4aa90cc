"""What ranks communicated, as values: the records that `recorded.py` makes, and the rules they are held against.

A record is the program of one rank as the host ran it: groups made, operations launched, waits, operators computed.
Everything here is pure and knows neither processes nor tensors. Alternative considered: checking while recording, which
could not compare ranks that run one after another.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TypeGuard


@dataclass(frozen=True, slots=True)
class Group:
    """A communicator.

    Attributes:
        name: PyTorch's name of the group; all members must have the same.
        axis: "world", "control", "dp", "tp", "kv", "tied_embedding", or a channel of `CHANNELS`.
        ranks: global ranks, in group order.
    """

    name: str
    axis: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.axis} group of ranks {listed(self.ranks)}"


@dataclass(frozen=True, slots=True)
class NewGroup:
    """The rank took part in making `group`."""

    group: Group


@dataclass(frozen=True, slots=True)
class Launch:
    """An operation given to a communicator; on NCCL a kernel on the communicator's own stream.

    Attributes:
        number: of this launch on its rank, from 0.
        kind: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "barrier", "send" or "recv".
        detail: what else must be equal on all members, such as the reduction ("sum", "max") or the source.
        shape: of the tensor the members must agree on: the gathered output, the scattered input, the message.
        nbytes: of that tensor.
        peer: the other global rank of a send or receive.
        message: what a send or receive carries, such as "F3.1": the action that needs it.
        caller: the engine's file, line and function that launched it.
    """

    number: int
    kind: str
    group: Group
    detail: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    peer: int | None
    message: str | None
    caller: str

    def __str__(self) -> str:
        details = ", ".join(filter(None, (self.detail, self.message)))
        return f"{self.kind} of {self.dtype} {list(self.shape)}{f' ({details})' if details else ''} at {self.caller}"


@dataclass(frozen=True, slots=True)
class Wait:
    """The compute stream (on a CPU or in the control group, the host) waits for a launch of this rank."""

    number: int
    caller: str


@dataclass(frozen=True, slots=True)
class Compute:
    """Operators launched on the compute stream since the event before."""

    count: int


@dataclass(frozen=True, slots=True)
class HostSync:
    """The host waits for the device: `.item()`, a synchronous copy, `torch.cuda.synchronize`."""

    caller: str


@dataclass(frozen=True, slots=True)
class Phase:
    """What the program does from here on, such as "step 2"."""

    name: str


Event = NewGroup | Launch | Wait | Compute | HostSync | Phase


@dataclass(frozen=True, slots=True)
class Record:
    """The program of one rank, and what was found wrong while it was recorded (memory touched under way)."""

    rank: int
    events: tuple[Event, ...]
    problems: tuple[str, ...] = ()


class Ranks:
    """The records of several ranks, with their launches in the order of each communicator.

    Attributes:
        records: by rank, ascending.
        collectives: of each group by member, the launches that all members make together, in order.
        messages: of each channel (group, source, target) the sends, and the receives, in order.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {record.rank: record for record in sorted(records, key=lambda record: record.rank)}
        self.collectives: dict[Group, dict[int, list[Launch]]] = {}
        self.messages: dict[tuple[Group, int, int], tuple[list[Launch], list[Launch]]] = {}
        known: dict[Group, Group] = {}
        for rank, record in self.records.items():
            same: dict[int, Group] = {}  # by identity: comparing the ranks of a large group at every launch is slow
            for event in record.events:
                if isinstance(event, Launch):
                    group = same.get(id(event.group))
                    if group is None:
                        group = same[id(event.group)] = known.setdefault(event.group, event.group)
                    self._add(rank, group, event)

    def _add(self, rank: int, group: Group, launch: Launch) -> None:
        if launch.peer is None:
            members = self.collectives.get(group)
            if members is None:
                members = self.collectives[group] = {member: [] for member in self.members(group)}
            members.setdefault(rank, []).append(launch)
        else:
            source, target = (rank, launch.peer) if launch.kind == "send" else (launch.peer, rank)
            sides = self.messages.setdefault((group, source, target), ([], []))
            sides[launch.kind == "recv"].append(launch)

    def members(self, group: Group) -> list[int]:
        """The recorded members of a group."""
        return [rank for rank in group.ranks if rank in self.records]


def problems(records: Sequence[Record], *, checks: Collection[str] | None = None, symmetric: bool = False) -> list[str]:
    """Hold the programs of ranks against each other; each problem in a line or two for people, the first of its kind.

    Args:
        checks: names from `CHECKS`; by default all.
        symmetric: members of a group may be missing because they run the program of one that is recorded.
    """
    ranks = Ranks(records)
    found = [text for name, check in CHECKS.items() if checks is None or name in checks for text in check(ranks)]
    if not symmetric and (checks is None or "groups" in checks):
        found += _missing_records(ranks)
    return found


def _missing_records(ranks: Ranks) -> Iterator[str]:
    groups = {event.group for record in ranks.records.values() for event in record.events if _makes(event)}
    if missing := sorted({rank for group in groups for rank in group.ranks} - set(ranks.records)):
        yield f"ranks {listed(missing)} belong to groups and have no record"


def _makes(event: Event) -> TypeGuard[NewGroup]:
    return isinstance(event, NewGroup)


def _check_groups(ranks: Ranks) -> Iterator[str]:
    """The members of a group make it under one name, and all groups in orders that agree; made before it is used."""
    made = {rank: [event.group for event in record.events if _makes(event)] for rank, record in ranks.records.items()}
    names: dict[tuple[str, tuple[int, ...]], dict[int, list[str]]] = {}
    for rank, groups in made.items():
        for group in groups:
            names.setdefault((group.axis, group.ranks), {}).setdefault(rank, []).append(group.name)
    for (axis, members), by_rank in names.items():
        here = [rank for rank in members if rank in ranks.records]
        for rank in here[1:]:
            if by_rank.get(rank) != by_rank.get(here[0]):
                theirs = [", ".join(by_rank.get(r, [])) or "nothing" for r in (here[0], rank)]
                yield (
                    f"{axis} group of ranks {listed(members)}: rank {here[0]} makes it as {theirs[0]}, rank {rank} as "
                    f"{theirs[1]}; they would wait for each other forever: make the same groups in the same order"
                )
                break
    yield from _group_cycle(made)
    yield from _unmade(ranks, made)


def _group_cycle(made: Mapping[int, Sequence[Group]]) -> Iterator[str]:
    follows = {pair: rank for rank, groups in sorted(made.items(), reverse=True) for pair in pairwise(groups)}
    order: TopologicalSorter[Group] = TopologicalSorter()
    for before, after in follows:
        order.add(after, before)
    try:
        order.prepare()
    except CycleError as error:
        steps = (f"rank {follows[pair]} makes the {pair[0]} before the {pair[1]}" for pair in pairwise(error.args[1]))
        yield f"{', but '.join(steps)}; make groups in one order on all ranks"


def _unmade(ranks: Ranks, made: Mapping[int, Sequence[Group]]) -> Iterator[str]:
    for rank, record in ranks.records.items():
        groups = set(made[rank])
        for group in dict.fromkeys(event.group for event in record.events if isinstance(event, Launch)):
            if group not in groups:
                yield f"rank {rank} uses {group}, which it has not made"


def _check_order(ranks: Ranks) -> Iterator[str]:
    """All members launch the same collectives on a group, in one order."""
    for group, by_rank in ranks.collectives.items():
        (first, reference), *others = by_rank.items()
        expected = [_agreed(launch) for launch in reference]
        for rank, launches in others:
            if [_agreed(launch) for launch in launches] != expected:
                yield _first_difference(str(group), (first, reference), (rank, launches))
                break


def _check_pairs(ranks: Ranks) -> Iterator[str]:
    """On every channel the n-th send meets the n-th receive: one size, one type, one message."""
    for (group, source, target), (sends, receives) in ranks.messages.items():
        if not {source, target} <= ranks.records.keys():
            continue
        if [_agreed(launch) for launch in sends] != [_agreed(launch) for launch in receives]:
            title = f"{group.axis} channel from rank {source} to {target}"
            yield _first_difference(title, (source, sends), (target, receives))


def _check_waits(ranks: Ranks) -> Iterator[str]:
    """Every launch is waited for once, and not before it."""
    for rank, record in ranks.records.items():
        launches: dict[int, Launch] = {}
        waited: Counter[int] = Counter()
        for event in record.events:
            if isinstance(event, Launch):
                launches[event.number] = event
            elif isinstance(event, Wait):
                waited[event.number] += 1
                if event.number not in launches:
                    yield f"rank {rank} waits for its launch {event.number} before it makes it ({event.caller})"
        for number, launch in launches.items():
            if waited[number] != 1:
                times = f"{waited[number]} times" if waited[number] else "never"
                yield f"rank {rank} waits {times} for {launch} on {launch.group}; wait for it once"
                break


def _check_memory(ranks: Ranks) -> Iterator[str]:
    """What was found wrong while a rank was recorded."""
    for rank, record in ranks.records.items():
        yield from (f"rank {rank}: {problem}" for problem in record.problems)


CHECKS: Mapping[str, Callable[[Ranks], Iterator[str]]] = {
    "groups": _check_groups,
    "order": _check_order,
    "pairs": _check_pairs,
    "waits": _check_waits,
    "memory": _check_memory,
}


def listed(ranks: Sequence[int]) -> str:
    """Ranks as `0, 2, 4`; of many, the first ones and how many there are."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{', '.join(map(str, ranks[:4]))}, … ({len(ranks)})"


def _agreed(launch: Launch) -> tuple[object, ...]:
    """What must be equal on all members of a collective, or on both sides of a message."""
    if launch.peer is not None:
        return launch.shape, launch.dtype, launch.message
    return launch.kind, launch.detail, launch.shape, launch.dtype


def _first_difference(title: str, one: tuple[int, Sequence[Launch]], other: tuple[int, Sequence[Launch]]) -> str:
    """The first number at which two members of a communicator do not do the same, with both callers."""
    pairs = enumerate(zip(one[1], other[1], strict=False))
    shorter = min(len(one[1]), len(other[1]))
    number = next((number for number, (a, b) in pairs if _agreed(a) != _agreed(b)), shorter)
    sides = [
        f"rank {rank} {launches[number]}" if number < len(launches) else f"rank {rank} nothing more"
        for rank, launches in (one, other)
    ]
    return f"{title}, number {number}: {sides[0]}, but {sides[1]}"

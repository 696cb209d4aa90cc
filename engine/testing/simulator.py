"""A simulator of ranks that communicate: does every program run to its end?

It knows hosts, compute streams and communicators, and no times. An operation that can start stays able to until it
does, so one order of events is enough: if one gets through, all do.

The three modes, from what the hardware does at best to what it does at worst:
- "streams": the host launches and goes on. A communicator has a stream of its own (on a group that is not bound to a
  device, each pair of ranks has one for its messages). An operation starts when the compute stream has come to its
  launch and its communicator's stream is free, and ends when all members have started it. A `Wait` holds the compute
  stream. A `HostSync` holds the host until the device is idle. So does the first use of a communicator, which then
  waits for the other members' hosts. The control group has no device: its waits hold the host.
- "one queue": also, what has been launched first starts first, on all streams of a device together
  (`CUDA_DEVICE_MAX_CONNECTIONS=1`, or streams that share a hardware queue).
- "synchronous": every operation holds the host where it is launched until all members have launched it. A program
  that ends this way ends in the other modes too, wherever and however often hosts stop for their devices: in the order
  in which the operations end here, the first unfinished one has everything before it finished on all its members, and
  a host, a stream or a queue holds back only what comes later.

Alternative considered: a search for cycles in the graph of all dependencies, which takes several times the memory.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, product
from typing import Literal

from engine.formatting import counted
from engine.testing.communication import (
    Compute,
    Event,
    Group,
    HostSync,
    Launch,
    NewGroup,
    Phase,
    Record,
    Wait,
)

Mode = Literal["streams", "one queue", "synchronous"]
MODES: tuple[Mode, ...] = ("streams", "one queue", "synchronous")

_Meeting = tuple[str | int, ...]  # what members meet for: to make, connect or operate, and what
_Place = tuple[_Meeting, int]  # a meeting and the number of the time


def find_hang(records: Sequence[Record], mode: Mode) -> str | None:
    """Run the programs of ranks; return who waits for whom where they hang, or None if all come to their end.

    Members of a group without a record are left out: they run the program of one that is recorded.
    """
    simulation = _Simulation(records, mode)
    simulation.run()
    return _explanation(simulation)


def with_stops(record: Record, positions: Sequence[int]) -> Record:
    """The program of a rank whose host also waits for its device before each event in `positions`."""
    events = list(record.events)
    for position in sorted(positions, reverse=True):
        events.insert(position, HostSync("a stop of the host"))
    return replace(record, events=tuple(events))


def unsafe_stops(records: Sequence[Record], mode: Mode = "streams", *, at_once: int = 1) -> list[dict[int, int]]:
    """Where the hosts of `at_once` ranks that share a group would hang if they stopped for their devices.

    Tries every position before an event that communicates, so it is for small layouts; `find_hang` in the mode
    "synchronous" covers every number of stops at once.

    Returns:
        For each way to hang, the position (a number of an event) by rank.
    """
    by_rank = {record.rank: record for record in records}
    unsafe = []
    for ranks in _neighbors(records, at_once):
        for positions in product(*(_positions(by_rank[rank]) for rank in ranks)):
            stops = dict(zip(ranks, positions, strict=True))
            stopped = [with_stops(r, [stops[r.rank]] if r.rank in stops else []) for r in records]
            if find_hang(stopped, mode) is not None:
                unsafe.append(stops)
    return unsafe


def _neighbors(records: Sequence[Record], count: int) -> Iterator[tuple[int, ...]]:
    """Every `count` ranks of which each two send each other messages or share a group that is not all ranks'."""
    groups = {
        record.rank: {e.group for e in record.events if isinstance(e, Launch) and len(e.group.ranks) < len(records)}
        for record in records
    }
    for ranks in combinations(groups, count):
        if len(records) == count or all(groups[a] & groups[b] for a, b in combinations(ranks, 2)):
            yield ranks


def _positions(record: Record) -> list[int]:
    return [number for number, event in enumerate(record.events) if isinstance(event, (Launch, Wait))]


@dataclass(frozen=True, eq=False)
class _Channel:
    """Where a launch goes: the stream it is in on each member, what its members meet for, and the recorded ones."""

    stream: int
    meeting: _Meeting
    members: tuple[int, ...]
    on_host: bool


@dataclass(eq=False)
class _Rank:
    """How far the program of a rank has come.

    Attributes:
        host, compute: the events that the host and the compute stream are at; the second is never ahead.
        arrived_at: the event at which the host came to its last meeting.
        streams: by stream the launches that the compute stream has passed and that have not ended; only the first has
            started. `busy` counts them all.
        launches, ended: by number of launch; whether it has ended.
        made: the groups and streams that this rank has.
        met: how often it has come to each meeting.
        channels: of each (identity of a group, peer, whether it receives).
    """

    number: int
    events: list[Event]
    launches: dict[int, Launch]
    ended: set[int] = field(default_factory=set)
    host: int = 0
    compute: int = 0
    arrived_at: int = -1
    busy: int = 0
    awake: bool = True
    streams: dict[int, deque[Launch]] = field(default_factory=lambda: defaultdict(deque))
    made: set[_Meeting] = field(default_factory=set)
    met: Counter[_Meeting] = field(default_factory=Counter)
    channels: dict[tuple[int, int | None, bool], _Channel] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether the device has done all that the host has launched."""
        return self.compute == self.host and not self.busy

    @property
    def finished(self) -> bool:
        return self.idle and self.host == len(self.events)


def _rank(record: Record) -> _Rank:
    events: list[Event] = [
        event for event in record.events if not isinstance(event, (Compute, Phase))
    ]  # they take no time here
    return _Rank(record.rank, events, {event.number: event for event in events if isinstance(event, Launch)})


class _Simulation:
    """The state of all ranks, and of the meetings that some members have come to and others not."""

    def __init__(self, records: Sequence[Record], mode: Mode) -> None:
        self.mode = mode
        self.ranks = {record.rank: _rank(record) for record in records}
        self.meetings: dict[_Place, tuple[tuple[int, ...], dict[int, Launch | None]]] = {}
        self.awake = deque(self.ranks.values())
        self.starting: list[tuple[_Rank, Launch]] = []
        self._groups: dict[Group, tuple[int, tuple[int, ...]]] = {}
        self._streams: dict[tuple[int, ...], int] = {}

    def run(self) -> None:
        """Advance all ranks as far as they can go."""
        while self.starting or self.awake:
            if self.starting:
                rank, launch = self.starting.pop()
                channel = self.channel(rank, launch)
                self._arrive(rank, channel.meeting, channel.members, launch)
            else:
                rank = self.awake.popleft()
                rank.awake = False
                self._advance(rank)

    def _advance(self, rank: _Rank) -> None:
        moved = True
        while moved:
            moved = False
            while rank.host < len(rank.events) and self._host_passes(rank, rank.events[rank.host]):
                rank.host += 1
                moved = True
            while rank.compute < rank.host and self._compute_passes(rank, rank.events[rank.compute]):
                rank.compute += 1
                moved = True

    def _host_passes(self, rank: _Rank, event: Event) -> bool:
        """Whether the host goes on after `event`; brings the rank to the meeting that the event is."""
        if isinstance(event, NewGroup):
            return self._passes_meeting(rank, *self._making(event.group))
        if isinstance(event, Launch):
            return self._host_launches(rank, event)
        if isinstance(event, HostSync):
            return self.mode == "synchronous" or rank.idle
        assert isinstance(event, Wait)
        launch = rank.launches.get(event.number)
        on_host = launch is not None and self.channel(rank, launch).on_host
        return not on_host or event.number in rank.ended

    def _host_launches(self, rank: _Rank, launch: Launch) -> bool:
        channel = self.channel(rank, launch)
        if self.mode == "synchronous" or channel.on_host:
            if rank.arrived_at != rank.host:
                rank.arrived_at = rank.host
                self._arrive(rank, channel.meeting, channel.members, launch)
            return self.mode != "synchronous" or launch.number in rank.ended
        connecting = ("connect", channel.stream)
        if connecting in rank.made:
            return True
        return rank.idle and self._passes_meeting(rank, connecting, channel.members)

    def _passes_meeting(self, rank: _Rank, meeting: _Meeting, members: tuple[int, ...]) -> bool:
        """Come to a meeting of hosts; whether all have."""
        if rank.arrived_at != rank.host:
            rank.arrived_at = rank.host
            rank.made.discard(meeting)
            self._arrive(rank, meeting, members, None)
        return meeting in rank.made

    def _compute_passes(self, rank: _Rank, event: Event) -> bool:
        """Whether the compute stream goes on after `event`; gives a launch to its stream."""
        if self.mode == "synchronous":
            return True
        if isinstance(event, Wait):
            return event.number in rank.ended or event.number not in rank.launches
        if isinstance(event, Launch) and not (channel := self.channel(rank, event)).on_host:
            stream = rank.streams[channel.stream]
            if stream and self.mode == "one queue":
                return False
            stream.append(event)
            rank.busy += 1
            if len(stream) == 1:
                self.starting.append((rank, event))
        return True

    def _arrive(self, rank: _Rank, meeting: _Meeting, members: tuple[int, ...], launch: Launch | None) -> None:
        """A member comes to a meeting; with the last one it ends for all."""
        number = rank.met[meeting]
        rank.met[meeting] += 1
        _, arrived = self.meetings.setdefault((meeting, number), (members, {}))
        arrived[rank.number] = launch
        if len(arrived) == len(members):
            del self.meetings[meeting, number]
            for member, theirs in arrived.items():
                self._end(self.ranks[member], meeting, theirs)

    def _end(self, rank: _Rank, meeting: _Meeting, launch: Launch | None) -> None:
        if launch is None:
            rank.made.add(meeting)
        else:
            rank.ended.add(launch.number)
            channel = self.channel(rank, launch)
            if self.mode != "synchronous" and not channel.on_host:
                stream = rank.streams[channel.stream]
                stream.popleft()
                rank.busy -= 1
                if stream:
                    self.starting.append((rank, stream[0]))
        if not rank.awake:
            rank.awake = True
            self.awake.append(rank)

    def channel(self, rank: _Rank, launch: Launch) -> _Channel:
        key = (id(launch.group), launch.peer, launch.kind == "recv")
        channel = rank.channels.get(key)
        if channel is None:
            channel = rank.channels[key] = self._new_channel(rank, launch)
        return channel

    def _new_channel(self, rank: _Rank, launch: Launch) -> _Channel:
        group, members = self._group(launch.group)
        on_host = launch.group.axis == "control"
        if launch.peer is None:
            return _Channel(self._stream(group), ("operate", group), members, on_host)
        sides = (launch.peer, rank.number) if launch.kind == "recv" else (rank.number, launch.peer)
        recorded = tuple(side for side in sides if side in self.ranks)
        return _Channel(self._stream(group, *sorted(sides)), ("operate", group, *sides), recorded, on_host)

    def _group(self, group: Group) -> tuple[int, tuple[int, ...]]:
        """A number for a group, and its recorded members."""
        found = self._groups.get(group)
        if found is None:
            members = tuple(rank for rank in group.ranks if rank in self.ranks)
            found = self._groups[group] = (len(self._groups), members)
        return found

    def _stream(self, *parts: int) -> int:
        return self._streams.setdefault(parts, len(self._streams))

    def _making(self, group: Group) -> tuple[_Meeting, tuple[int, ...]]:
        number, members = self._group(group)
        return ("make", number), members


def _explanation(simulation: _Simulation) -> str | None:
    """Who waits for whom, from the lowest rank that hangs along those it waits for, to a cycle or to an end."""
    stuck = [rank for rank in simulation.ranks.values() if not rank.finished]
    if not stuck:
        return None
    trace = _Trace(simulation)
    number = min(rank.number for rank in stuck)
    links: dict[_Place | None, str] = {}
    place, text = trace.stops_at(simulation.ranks[number])
    while place is not None and place not in links:
        missing = trace.missing(place)
        links[place] = f"rank {number} {text} and waits for rank {missing}"
        number = missing
        place, text = trace.keeps_from(simulation.ranks[missing], place)
    if place is None:
        links[place] = f"rank {number} {text}"
    texts = list(links.values())
    cycle = texts[0 if place is None else list(links).index(place) :]
    return f"{simulation.mode}: {len(stuck)} of {counted(len(simulation.ranks), 'rank')} hang: {' → '.join(cycle)}"


class _Trace:
    """Finds what holds a rank up in a simulation that hangs."""

    def __init__(self, simulation: _Simulation) -> None:
        self.simulation = simulation
        self.places = {
            (rank, None if launch is None else launch.number): place
            for place, (_, arrived) in simulation.meetings.items()
            for rank, launch in arrived.items()
        }

    def missing(self, place: _Place) -> int:
        """The lowest rank that has not come to a meeting."""
        members, arrived = self.simulation.meetings[place]
        return min(set(members) - arrived.keys())

    def stops_at(self, rank: _Rank) -> tuple[_Place | None, str]:
        """The meeting that a rank cannot get past, and what it does there."""
        if rank.host == len(rank.events):
            return self._device(rank)
        event = rank.events[rank.host]
        if isinstance(event, Wait):
            return self.places[rank.number, event.number], f"stops at {rank.launches[event.number]}"
        if rank.arrived_at == rank.host:
            operates = isinstance(event, Launch) and self.simulation.mode == "synchronous"
            number = event.number if isinstance(event, Launch) and operates else None
            return self.places[rank.number, number], f"stops at {_described(event)}"
        place, text = self._device(rank)
        return place, f"(whose host waits for its device at {_described(event)}) {text}"

    def keeps_from(self, rank: _Rank, place: _Place) -> tuple[_Place | None, str]:
        """The meeting that keeps a rank from coming to `place`; None if it never would."""
        (kind, *_), _ = place
        if kind == "operate":
            index = self._index(rank, *place)
            if index is None:
                return None, "never launches it"
            launch = rank.events[index]
            assert isinstance(launch, Launch)
            if index < rank.host and not self.simulation.channel(rank, launch).on_host:
                return self._stream(rank, launch) if index < rank.compute else self._device(rank)
        elif rank.host == len(rank.events):
            return None, "never comes there"
        return self.stops_at(rank)

    def _index(self, rank: _Rank, meeting: _Meeting, number: int) -> int | None:
        """Which event of a rank launches operation `number` of a communicator."""
        matching = (
            index
            for index, event in enumerate(rank.events)
            if isinstance(event, Launch) and self.simulation.channel(rank, event).meeting == meeting
        )
        return next(islice(matching, number, None), None)

    def _device(self, rank: _Rank) -> tuple[_Place, str]:
        """What the device of a rank is at."""
        if rank.compute < rank.host:
            event = rank.events[rank.compute]
            launch = rank.launches[event.number] if isinstance(event, Wait) else event
        else:
            launch = next(stream[0] for stream in rank.streams.values() if stream)
        assert isinstance(launch, Launch)
        return self._stream(rank, launch)

    def _stream(self, rank: _Rank, launch: Launch) -> tuple[_Place, str]:
        """What the stream of a launch is at."""
        running = rank.streams[self.simulation.channel(rank, launch).stream][0]
        return self.places[rank.number, running.number], f"is in {running}"


def _described(event: Event) -> str:
    if isinstance(event, NewGroup):
        return f"the making of the {event.group}"
    if isinstance(event, HostSync):
        return event.caller
    return str(event)

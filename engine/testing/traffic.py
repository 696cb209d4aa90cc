"""How much ranks communicate: bytes by axis and kind, launches, communicators, and what is in flight at once.

Bytes are those that a rank sends with the ring algorithms, for a tensor of `nbytes` over n ranks (Thakur et al. 2005;
Patarasuk and Yuan 2009): an all-gather and a reduce-scatter (n − 1)/n of the whole tensor, an all-reduce both, so twice
that; an all-to-all (n − 1)/n of what the rank has; a broadcast the tensor once; a send its message, a receive nothing.
NCCL may choose other algorithms, which differ in latency more than in bytes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.testing.communication import Event, Launch, Phase, Record, Wait

_SHARES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}  # times (n − 1)/n of the tensor


@dataclass(frozen=True)
class Traffic:
    """What one rank communicates.

    Attributes:
        sent: bytes by (axis, kind).
        launches: number by (axis, kind).
        peak_bytes: most bytes of tensors that were launched and not waited for, at once, in the order of the host.
    """

    sent: Counter[tuple[str, str]]
    launches: Counter[tuple[str, str]]
    peak_bytes: int


def sent_bytes(launch: Launch) -> int:
    """Bytes that the launching rank sends; see the formulas above."""
    if launch.peer is not None:
        return launch.nbytes if launch.kind == "send" else 0
    if launch.kind in _SHARES:
        n = len(launch.group.ranks)
        return _SHARES[launch.kind] * launch.nbytes * (n - 1) // n
    return launch.nbytes if launch.kind == "broadcast" else 0


def traffic(events: Iterable[Event]) -> Traffic:
    """Add up the events of a rank, or of a part of its program, such as one step."""
    sent: Counter[tuple[str, str]] = Counter()
    launches: Counter[tuple[str, str]] = Counter()
    in_flight: dict[int, int] = {}
    peak = now = 0
    for event in events:
        if isinstance(event, Launch):
            key = (event.group.axis, event.kind)
            sent[key] += sent_bytes(event)
            launches[key] += 1
            in_flight[event.number] = event.nbytes
            now += event.nbytes
            peak = max(peak, now)
        elif isinstance(event, Wait):
            now -= in_flight.pop(event.number, 0)
    return Traffic(sent, launches, peak)


def communicators(record: Record) -> Counter[str]:
    """How many communicators a rank creates on its device, by axis: one a group for its collectives, and on groups that
    are not bound to a device one for each pair of ranks with messages. The control group has none.
    """
    launches = (event for event in record.events if isinstance(event, Launch) and event.group.axis != "control")
    return Counter(group.axis for group, _ in dict.fromkeys((launch.group, launch.peer) for launch in launches))


def busiest(parts: Sequence[Traffic]) -> Traffic:
    """Of several ranks, for each kind the most that any of them sends and launches."""
    sent: Counter[tuple[str, str]] = Counter()
    launches: Counter[tuple[str, str]] = Counter()
    for part in parts:
        sent |= part.sent
        launches |= part.launches
    return Traffic(sent, launches, max((part.peak_bytes for part in parts), default=0))


def phases(record: Record) -> dict[str, list[Event]]:
    """The events of a record by the phase of its program; those before the first phase under ""."""
    found: dict[str, list[Event]] = {"": []}
    name = ""
    for event in record.events:
        if isinstance(event, Phase):
            name = event.name
        found.setdefault(name, []).append(event)
    return found

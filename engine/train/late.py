"""Which rank a hang is due to, from what all ranks were doing when it was noticed.

Pure functions of the ranks' reports. A rank that waits in a communication is not to blame: the one that it waits for
is. Alternative considered: the rank whose limit was exceeded first, which is as often one of those that wait.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

_NAMED = 8  # ranks that a message lists


@dataclass(frozen=True)
class RankReport:
    """What one rank was doing.

    Attributes:
        text: phase and pipeline action.
        number: notes so far; more than another rank's means further on, among ranks that run the same program.
        idle_s: seconds since the last note.
        stopped: the process is stopped (SIGSTOP).
        silent: its threads do not run: one of them holds the interpreter lock.
        stopped_children: process numbers of its data loader processes that are stopped.
        waits: the axis of the communication that it waits in; None if it waits in none.
        peers: the ranks that take part in that communication; empty: all.
        calls: collectives begun, by axis.
        where: the innermost line of the engine, or of any code.
    """

    rank: int
    host: str
    text: str
    number: int = 0
    idle_s: float = 0.0
    stopped: bool = False
    silent: bool = False
    stopped_children: tuple[int, ...] = ()
    waits: str | None = None
    peers: tuple[int, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    where: str = ""

    def to_json(self) -> str:
        return orjson.dumps(asdict(self)).decode()

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        raw: dict[str, Any] = orjson.loads(text)
        return cls(**raw | {name: tuple(raw[name]) for name in ("stopped_children", "peers")})


def find_late(reports: Mapping[int, RankReport], world_size: int) -> dict[int, str]:
    """The ranks that the others wait for, each with the reason. Empty: all wait, and none is behind another."""
    missing = {rank: "does not answer" for rank in range(world_size) if rank not in reports}
    stuck = {rank: why for rank, report in reports.items() if (why := _why_stuck(report))}
    if missing or stuck:
        return missing | stuck
    busy = {r.rank: f"is in {r.text}, at {r.where}" for r in reports.values() if r.waits is None}
    return busy if busy and len(busy) < world_size else _behind(reports)


def _why_stuck(report: RankReport) -> str | None:
    if report.stopped:
        return f"is stopped (SIGSTOP): {report.text}"
    if report.silent:
        return f"cannot run Python, as a thread holds the interpreter lock: {report.text}"
    if report.stopped_children:
        return f"waits for its process {report.stopped_children[0]}, which is stopped: {report.text}"
    return None


def _behind(reports: Mapping[int, RankReport]) -> dict[int, str]:
    """All wait: those that have not made the call which the rank that is least far on waits in.

    Ranks further on may wait in later calls for ranks that wait here, so a count behind another's is not enough.
    """
    votes: dict[int, list[int]] = {r.rank: _waits_for(r, reports) for r in reports.values()}
    waiting = [r for r in reports.values() if votes[r.rank]]
    if not waiting:
        return {}
    first = min(_progress(r) for r in waiting)
    named = Counter(rank for r in waiting if _progress(r) == first for rank in votes[r.rank])
    most = max(named.values())
    late = {}
    for rank in sorted(rank for rank, count in named.items() if count == most):
        by = next(r for r in waiting if rank in votes[r.rank] and _progress(r) == first)
        at, axis = reports[rank], by.waits or ""
        call = f"call {by.calls[axis]:,} of {axis}" if axis in by.calls else f"message of {axis}"
        late[rank] = f"has not come to {call}, in which rank {by.rank} waits: {at.text}, waits in {at.waits}"
    return late


def _waits_for(report: RankReport, reports: Mapping[int, RankReport]) -> list[int]:
    """The ranks that have begun fewer collectives on the axis on which `report` waits."""
    axis = report.waits
    if axis is None:
        return []
    peers = [rank for rank in report.peers or reports if rank != report.rank and rank in reports]
    if axis not in report.calls:
        return peers  # a message of a pipeline stage
    return [rank for rank in peers if reports[rank].calls.get(axis, 0) < report.calls[axis]]


def _progress(report: RankReport) -> tuple[int, int]:
    words = report.text.replace(",", " ").split()
    step = next((int(word) for word in words if word.isdigit()), 0)
    return step, report.number


def describe_hang(reports: Mapping[int, RankReport], world_size: int, limit_s: float) -> str:
    """The late ranks, and what the others wait in, on one line."""
    late = find_late(reports, world_size)
    said = [f"{_name(rank, reports)} {why}" for rank, why in list(late.items())[:_NAMED]]
    if not late:
        said = ["all ranks wait, and none is behind: a device or the network between the hosts does not answer"]
    rest = [r for rank, r in sorted(reports.items()) if rank not in late]
    others = [f"rank {r.rank} in {r.waits or r.where} ({r.text})" for r in rest[:_NAMED]]
    more = f" and {len(rest) - _NAMED:,} more" * (len(rest) > _NAMED)
    waiting = f"; waiting: {', '.join(others)}{more}" if others else ""
    return f"no progress for {limit_s:.3g} s: {'; '.join(said)}{waiting}"


def _name(rank: int, reports: Mapping[int, RankReport]) -> str:
    return f"rank {rank} ({reports[rank].host})" if rank in reports else f"rank {rank}"

"""Programs of ranks written by hand, for the tests of what holds them against each other."""

from collections.abc import Sequence

from engine.testing.communication import Event, Group, HostSync, Launch, NewGroup, Record, Wait


class Program:
    """The program of one rank; every group that it uses is made and connected by `connect`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[Event] = []
        self.launches = 0

    def make(self, *groups: Group) -> "Program":
        self.events += [NewGroup(group) for group in groups if self.rank in group.ranks]
        return self

    def launch(
        self, kind: str, group: Group, *, peer: int | None = None, message: str | None = None, size: int = 4
    ) -> int:
        detail = "sum" if "reduce" in kind else ""
        caller = f"engine/{kind}.py:{self.launches}"
        launch = Launch(self.launches, kind, group, detail, (size,), "float32", 4 * size, peer, message, caller)
        self.events.append(launch)
        self.launches += 1
        return launch.number

    def wait(self, *numbers: int) -> "Program":
        self.events += [Wait(number, f"engine/wait.py:{number}") for number in numbers]
        return self

    def stop(self) -> "Program":
        self.events.append(HostSync("engine/item.py:1"))
        return self

    def call(self, kind: str, group: Group, **options: object) -> "Program":
        """Launch and wait."""
        return self.wait(self.launch(kind, group, **options))  # type: ignore[arg-type]

    def send(self, group: Group, peer: int, message: str) -> int:
        return self.launch("send", group, peer=peer, message=message)

    def receive(self, group: Group, peer: int, message: str) -> int:
        return self.launch("recv", group, peer=peer, message=message)

    def connect(self, *groups: Group) -> "Program":
        """One tiny operation on each group of two ranks, so that later ones find its communicators created."""
        for group in groups:
            low, high = group.ranks
            kind, peer = ("send", high) if self.rank == low else ("recv", low)
            self.call("all_reduce", group, size=1)
            self.call(kind, group, peer=peer, size=1)
        return self

    def record(self, *problems: str) -> Record:
        return Record(self.rank, tuple(self.events), problems)


def records(programs: Sequence[Program]) -> list[Record]:
    return [program.record() for program in programs]

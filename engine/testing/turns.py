"""How recorded ranks take turns in one process, and what the numbers are that they agree on.

`EqualRanks` runs one rank after another, which needs the memory of one, and answers the control group as in a healthy
run. `Lockstep` runs them as threads, one at a time, and turns to the next whenever a rank waits for numbers of all
others; these are then real, so that evaluation, commits of checkpoints, stops and failures go as they would.
"""

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")
_c10d: Any = torch._C._distributed_c10d  # its stubs lack what PyTorch's own tests use


class Turns(Protocol):
    """Runs ranks, and answers their collectives on the groups of `axes`."""

    axes: frozenset[str]

    def run(self, ranks: Sequence[int], body: Callable[[int], _T], enter: Callable[[int], None]) -> list[_T]:
        """Return `body(rank)` of all ranks; `enter(rank)` is called whenever it is another one's turn."""

    def all_reduce(self, rank: int, tensor: Tensor) -> None:
        """Replace the values of `rank` by the sum over all ranks."""

    def broadcast(self, rank: int, tensor: Tensor, source: int) -> None:
        """Replace the values of `rank` by those of `source`."""


class EqualRanks:
    """One rank after another. All ranks are told what would be so if all had the numbers of the first one to run."""

    axes = frozenset({"control"})

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.answers: list[Tensor] = []
        self.given: dict[int, int] = defaultdict(int)  # answers, by rank

    def run(self, ranks: Sequence[int], body: Callable[[int], _T], enter: Callable[[int], None]) -> list[_T]:
        results = []
        for rank in ranks:
            enter(rank)
            results.append(body(rank))
        return results

    def all_reduce(self, rank: int, tensor: Tensor) -> None:
        own = tensor[rank].clone() if _in_gather_ints() else None
        self._answer(rank, tensor, tensor * self.world_size if own is None else own.expand_as(tensor))

    def broadcast(self, rank: int, tensor: Tensor, source: int) -> None:
        self._answer(rank, tensor, tensor)

    def _answer(self, rank: int, tensor: Tensor, of_equal_ranks: Tensor) -> None:
        number = self.given[rank]
        self.given[rank] += 1
        if number == len(self.answers):
            self.answers.append(of_equal_ranks.clone())
        if self.answers[number].shape == tensor.shape:  # else another program, which the records will show
            tensor.copy_(self.answers[number])


def _in_gather_ints() -> bool:
    """Whether the numbers to add up are those of `gather_ints`: of each rank one, and zeros."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "gather_ints":
            return True
    return False


@dataclass
class _Rank:
    """A thread, what it waits for, and how it ended."""

    thread: threading.Thread
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    wants: tuple[str, Tensor, int] | None = None
    result: Any = None
    error: BaseException | None = None
    ended: bool = False


class LeftAloneError(RuntimeError):
    """A rank waits for numbers of others that have ended, or that wait for something else."""


class Lockstep:
    """All ranks at once, as threads of which one runs. A rank that ends while others wait for it ends them too."""

    axes = frozenset({"control", "world"})

    def __init__(self) -> None:
        self.ranks: dict[int, _Rank] = {}
        self.handlers: dict[tuple[int, int], Callable[[int, Any], None]] = {}
        self._back = threading.Semaphore(0)
        self._current = 0

    def run(self, ranks: Sequence[int], body: Callable[[int], _T], enter: Callable[[int], None]) -> list[_T]:
        """Return the results as above.

        Raises:
            LeftAloneError: not all ranks take part in an exchange of numbers.
            Exception: the error of the lowest rank that has failed, if one has.
        """
        from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld  # for tests, as here

        self.ranks = {rank: _Rank(threading.Thread(target=self._thread, args=(rank, body))) for rank in ranks}
        # Each thread has its own default process group and names of groups, and no thread may install a handler.
        world = mock.patch.object(dist.distributed_c10d, "_world", ThreadLocalWorld())
        _c10d._set_thread_isolation_mode(True)
        try:
            with world, mock.patch.object(signal, "signal", self._install):
                for one in self.ranks.values():
                    one.thread.start()
                while waiting := {rank: one for rank, one in self.ranks.items() if not one.ended}:
                    for rank, one in waiting.items():
                        self._current = rank
                        enter(rank)
                        one.go.release()
                        self._back.acquire()
                    self._exchange()
        finally:
            _c10d._set_thread_isolation_mode(False)
        errors = [one.error for one in self.ranks.values() if one.error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, LeftAloneError)):  # a consequence, if any other
            raise error
        return [one.result for one in self.ranks.values()]

    def all_reduce(self, rank: int, tensor: Tensor) -> None:
        self._wait(rank, "all_reduce", tensor, -1)

    def broadcast(self, rank: int, tensor: Tensor, source: int) -> None:
        self._wait(rank, "broadcast", tensor, source)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Let the handler that `rank` has installed run, as a signal does."""
        self.handlers[rank, number](number, None)

    def _install(self, number: int, handler: Callable[[int, Any], None]) -> None:
        self.handlers[self._current, number] = handler

    def _thread(self, rank: int, body: Callable[[int], Any]) -> None:
        own = self.ranks[rank]
        own.go.acquire()
        try:
            own.result = body(rank)
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"on rank {rank}")
            own.error = error
        own.ended = True
        self._back.release()

    def _wait(self, rank: int, kind: str, tensor: Tensor, source: int) -> None:
        own = self.ranks[rank]
        own.wants = kind, tensor, source
        self._back.release()
        own.go.acquire()
        if own.wants is not None:
            raise LeftAloneError(f"rank {rank} is in {kind}, and other ranks are not")

    def _exchange(self) -> None:
        """Answer what all ranks wait for; none, where one has ended or wants something else."""
        wants = [one.wants for one in self.ranks.values()]
        asked = [want for want in wants if want is not None]
        if len(asked) < len(wants) or len({(kind, x.shape, source) for kind, x, source in asked}) > 1:
            return
        kind, _, source = asked[0]
        values = [x for _, x, _ in asked]
        total = torch.stack(values).sum(0) if kind == "all_reduce" else values[source].clone()
        for one, x in zip(self.ranks.values(), values, strict=True):
            x.copy_(total)
            one.wants = None

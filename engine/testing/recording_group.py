"""A process group that communicates with nobody: it notes each operation on a tape and makes up what would arrive.

A gather repeats this rank's own part, a receive gives a small constant, a sum leaves this rank's own values, so that
losses are finite. Numbers that decide what the program does next, those of the control group, come from `Turns`.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _DisableTorchDispatch  # what happens here is no operator of the program

from engine.testing.communication import Group
from engine.testing.tape import Tape
from engine.testing.turns import Turns

_ProcessGroup: Any = dist.ProcessGroup  # its stubs list overloads that no Python group can have
_RECEIVED = 0.01  # of every element of a message


class RecordedWork(dist.Work):
    """The handle of a recorded operation; complete once it has been waited for."""

    def __init__(self, tape: Tape, number: int) -> None:
        super().__init__()
        self.tape, self.number = tape, number

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.tape.wait(self.number)
        return True

    def is_completed(self) -> bool:
        return self.number not in self.tape.under_way


class RecordingGroup(_ProcessGroup):  # type: ignore[misc]
    """The process group of one rank, on a tape.

    Attributes:
        group: set by `name_axis`, after PyTorch has made the group.
    """

    def __init__(self, tape: Tape, turns: Turns, name: str, ranks: tuple[int, ...], rank: int) -> None:
        super().__init__(rank, len(ranks))
        self.tape, self.turns = tape, turns
        self.group = Group(name, "unnamed", ranks)

    @property
    def group_name(self) -> str:
        return self.group.name

    def name_axis(self, axis: str) -> None:
        self.group = Group(self.group.name, axis, self.group.ranks)

    def shutdown(self) -> None:
        """Nothing to close."""

    def allreduce(self, tensors: list[Tensor], opts: Any) -> RecordedWork:
        (tensor,), reduction = tensors, _reduction(opts)
        if self.group.axis in self.turns.axes and reduction == "sum":
            with _DisableTorchDispatch():
                self.turns.all_reduce(self.tape.rank, tensor)
        return self._launch("all_reduce", tensor, writes=tensors, detail=reduction)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> RecordedWork:
        (tensor,) = tensors
        source = self.group.ranks[opts.rootRank]
        if self.group.axis in self.turns.axes:
            with _DisableTorchDispatch():
                self.turns.broadcast(self.tape.rank, tensor, source)
        sends = self.tape.rank == source
        access = {"reads": tensors} if sends else {"writes": tensors}
        return self._launch("broadcast", tensor, detail=f"from {source}", **access)

    def barrier(self, opts: Any) -> RecordedWork:
        return self._launch("barrier", torch.empty(0))

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any) -> RecordedWork:
        with _DisableTorchDispatch():
            out.view(self.size(), *x.shape).copy_(x.clone())
        return self._launch("all_gather", out, reads=[x], writes=[out])

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any) -> RecordedWork:
        with _DisableTorchDispatch():
            out.detach().copy_(x.view(self.size(), *out.shape)[self.rank()])
        return self._launch("reduce_scatter", x, reads=[x], writes=[out], detail=_reduction(opts))

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], opts: Any
    ) -> RecordedWork:
        with _DisableTorchDispatch():
            out.detach().copy_(x) if out.shape == x.shape else out.detach().fill_(0)
        return self._launch("all_to_all", x, reads=[x], writes=[out], detail=f"{in_splits} {out_splits}")

    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def send(self, tensors: list[Tensor], target: int, tag: int) -> RecordedWork:
        return self._launch("send", tensors[0], reads=tensors, peer=self.group.ranks[target])

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> RecordedWork:
        with _DisableTorchDispatch():
            tensors[0].detach().fill_(_RECEIVED)
        return self._launch("recv", tensors[0], writes=tensors, peer=self.group.ranks[source])

    def _launch(self, kind: str, tensor: Tensor, **details: Any) -> RecordedWork:
        return RecordedWork(self.tape, self.tape.launch(kind, self.group, tensor, **details))


def _reduction(opts: Any) -> str:
    return str(opts.reduceOp.op if hasattr(opts.reduceOp, "op") else opts.reduceOp).rpartition(".")[2].lower()

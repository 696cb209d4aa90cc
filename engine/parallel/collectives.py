"""Collectives over a group, plain ones to overlap and differentiable ones for sequences.

Every collective starts at once and returns a `Work`; the caller computes and then waits. NCCL has a native call for
each. gloo's native gather and reduce-scatter copy through buffers of their own, so there the ranks exchange their parts
in pairs, straight from and into the callers' memory, and each adds up what it received, always in the same order.
Alternative considered: sends and receives. They are as fast on an idle machine, but the computing thread posts them,
which costs it milliseconds when all cores are busy; gloo runs collectives on threads of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed the two collectives; the old names warn there.
_native_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """A handle of communication in progress."""

    def wait(self) -> None:
        """Finish; call once. On CUDA the current stream waits and the host does not."""


class CompletedWork:
    """No-op work handle for a single-rank group."""

    def wait(self) -> None:
        pass


def all_gather(out: Tensor, x: Tensor, group: ProcessGroup) -> Work:
    """Concatenate the ranks' x [k, ...] along dim 0 into out [n·k, ...]; both contiguous, of one dtype.

    x may be this rank's own slice of out. Until `wait`, x must not be written nor out be read.
    """
    n, rank = group.size(), group.rank()
    parts = out.chunk(n)
    assert parts[rank].shape == x.shape and out.is_contiguous() and x.is_contiguous()
    if dist.get_backend(group) != "gloo":
        return _Started([_native_all_gather(out, x, group=group, async_op=True)], group)
    parts[rank].copy_(x)
    return _Started([_exchange(parts[(rank - shift) % n], x, shift, group) for shift in range(1, n)], group)


def reduce_scatter(out: Tensor, x: Tensor, group: ProcessGroup) -> Work:
    """Sum the ranks' x [n·k, ...] and keep this rank's part, out [k, ...]; both contiguous, of one dtype.

    out may be this rank's own slice of x; the rest of x is then undefined. Until `wait`, x must not be written nor out
    be read. Sums in the tensors' dtype; repeats bitwise.
    """
    n, rank = group.size(), group.rank()
    parts = x.chunk(n)
    assert parts[rank].shape == out.shape and out.is_contiguous() and x.is_contiguous()
    if dist.get_backend(group) != "gloo":
        return _Started([_native_reduce_scatter(out, x, group=group, async_op=True)], group)
    addends = [torch.empty_like(out) for _ in range(1, n)]
    works = [_exchange(addends[shift - 1], parts[(rank + shift) % n], shift, group) for shift in range(1, n)]
    return _Summed(out, parts[rank], works, addends, group)


def all_reduce(x: Tensor, group: ProcessGroup) -> Work:
    """Sum x over the ranks, in place and bitwise equal on all of them. Until `wait`, x must not be touched."""
    return _Started([dist.all_reduce(x, group=group, async_op=True)], group)


def all_max(x: Tensor, group: ProcessGroup) -> Work:
    """Raise x to the largest over the ranks, in place. Until `wait`, x must not be touched."""
    return _Started([dist.all_reduce(x, dist.ReduceOp.MAX, group=group, async_op=True)], group)


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate the ranks' x [k, ...] along dim 0 into a new tensor [n·k, ...], and wait; not differentiable."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    all_gather(out, x.contiguous(), group).wait()
    return out


def gather_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """All tokens from every rank's part: [t/n, h] -> [t, h]. Backward sums the ranks' gradients and keeps our part."""
    return x if group is None else _GatherSequence.apply(x, group)


def scatter_sequence_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's tokens of the sum over the ranks: [t, h] -> [t/n, h]. Backward gathers the ranks' gradients."""
    return x if group is None else _ScatterSequenceSum.apply(x, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return scatter_sequence_sum(grad_outputs[0], ctx.group), None


class _ScatterSequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
        reduce_scatter(out, x.contiguous(), group).wait()
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return gather_sequence(grad_outputs[0], ctx.group), None


@dataclass
class _Started:
    """Native calls; they keep their tensors alive. The watchdog reads the group of a rank that waits."""

    works: Sequence[dist.Work]
    group: ProcessGroup

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass
class _Summed:
    """Own part and the other ranks' addends, which `works` are bringing."""

    out: Tensor
    own: Tensor
    works: Sequence[dist.Work]
    addends: Sequence[Tensor]
    group: ProcessGroup

    def wait(self) -> None:
        total = self.own
        for work, addend in zip(self.works, self.addends, strict=True):
            work.wait()
            total = torch.add(total, addend, out=self.out)
        if not self.works:
            self.out.copy_(self.own)


def _exchange(received: Tensor, sent: Tensor, shift: int, group: ProcessGroup) -> dist.Work:
    """Send to the rank `shift` places further and receive from the one `shift` places before, around the group."""
    n, rank = group.size(), group.rank()
    receive, send = [0] * n, [0] * n  # rows from and to each rank
    receive[(rank - shift) % n] = received.shape[0]
    send[(rank + shift) % n] = sent.shape[0]
    return dist.all_to_all_single(received, sent, receive, send, group=group, async_op=True)

"""Collectives over a group: gather, sum and scatter, sum; plain ones to overlap and differentiable ones for sequences.

Every collective starts at once and returns a `Pending`; the caller computes and then waits. NCCL has a native call for
each. gloo's native gather and reduce-scatter copy everything through buffers of their own and sum on the transport's
time, so there the ranks take turns: each broadcasts its part, or scatters its addends, straight from and into the
caller's memory, and the sum is ours, in an order that never changes (docs/measurements.md has the numbers).
Rejected: sends and receives between all pairs. Alone they are as fast, but they are posted by the computing thread, and
where that loses its core while it holds gloo's lock, the transport spins until it returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

# torch 2.13 renamed the two collectives; the old names warn there.
_native_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """Communication under way."""

    def wait(self) -> None:
        """Finish; call once. On CUDA the current stream waits and the host does not."""


def all_gather(out: Tensor, x: Tensor, group: ProcessGroup) -> Pending:
    """Concatenate the ranks' x [k, ...] along dim 0 into out [n·k, ...]; both contiguous, of one dtype.

    x may be this rank's own slice of out. Until `wait`, x must not be written nor out be read.
    """
    parts, rank = out.chunk(group.size()), group.rank()
    assert parts[rank].shape == x.shape and out.is_contiguous() and x.is_contiguous()
    if dist.get_backend(group) != "gloo":
        return _Started([_native_all_gather(out, x, group=group, async_op=True)])
    parts[rank].copy_(x)
    return _Started([dist.broadcast(part, group=group, group_src=i, async_op=True) for i, part in enumerate(parts)])


def reduce_scatter(out: Tensor, x: Tensor, group: ProcessGroup) -> Pending:
    """Sum the ranks' x [n·k, ...] and keep this rank's part, out [k, ...]; both contiguous, of one dtype.

    out may be this rank's own slice of x; the rest of x is then undefined. Until `wait`, x must not be written nor out
    be read. The addends are taken in the dtype and, on gloo, in the order of the ranks.
    """
    parts, rank = x.chunk(group.size()), group.rank()
    assert parts[rank].shape == out.shape and out.is_contiguous() and x.is_contiguous()
    if dist.get_backend(group) != "gloo":
        return _Started([_native_reduce_scatter(out, x, group=group, async_op=True)])
    buffers = list(torch.empty_like(x).chunk(group.size()))
    buffers[rank] = out
    works = [
        dist.scatter(buffer, list(parts) if i == rank else None, group=group, group_src=i, async_op=True)
        for i, buffer in enumerate(buffers)
    ]
    others = [i for i in range(group.size()) if i != rank]
    return _SummedOnWait(out, works[rank], [(works[i], buffers[i]) for i in others])


def all_reduce(x: Tensor, group: ProcessGroup) -> Pending:
    """Sum x over the ranks, in place and bitwise equal on all of them. Until `wait`, x must not be touched."""
    return _Started([dist.all_reduce(x, group=group, async_op=True)])


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
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        all_gather(out, x.contiguous(), group).wait()
        return out

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
    """Native calls; they keep their tensors alive."""

    works: Sequence[Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass
class _SummedOnWait:
    """Every rank's addend under way to its own tensor, this rank's to `out`."""

    out: Tensor
    own: Work
    others: Sequence[tuple[Work, Tensor]]

    def wait(self) -> None:
        self.own.wait()
        for work, addend in self.others:
            work.wait()
            self.out.add_(addend)

"""Plain stand-in while the measured one is being written."""

from typing import Protocol

import torch
import torch.distributed as dist


class Pending(Protocol):
    def wait(self) -> None: ...


def all_gather(out, x, group):
    return dist.all_gather_into_tensor(out, x, group=group, async_op=True)


class _Copy:
    def __init__(self, out, tmp, work):
        self.out, self.tmp, self.work = out, tmp, work

    def wait(self):
        self.work.wait()
        self.out.copy_(self.tmp)


def reduce_scatter(out, x, group):
    tmp = torch.empty_like(out)
    return _Copy(out, tmp, dist.reduce_scatter_tensor(tmp, x, group=group, async_op=True))


def all_reduce(x, group):
    return dist.all_reduce(x, group=group, async_op=True)


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        all_gather(out, x.contiguous(), group).wait()
        return out

    @staticmethod
    def backward(ctx, g):
        out = g.new_empty(g.shape[0] // ctx.group.size(), *g.shape[1:])
        reduce_scatter(out, g.contiguous(), ctx.group).wait()
        return out, None


class _S(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, group):
        ctx.group = group
        out = g.new_empty(g.shape[0] // ctx.group.size(), *g.shape[1:])
        reduce_scatter(out, g.contiguous(), ctx.group).wait()
        return out

    @staticmethod
    def backward(ctx, x):
        out = x.new_empty(x.shape[0] * ctx.group.size(), *x.shape[1:])
        all_gather(out, x.contiguous(), ctx.group).wait()
        return out, None


def gather_sequence(x, group):
    return x if group is None else _G.apply(x, group)


def scatter_sequence_sum(x, group):
    return x if group is None else _S.apply(x, group)

"""Communication whose results come when they are waited for, and never before.

Communication that is fast enough hides a missing wait: the result is there anyway. Here a result is NaN until `wait`,
and what must not be touched before is looked at then, so a wait too few or too late fails every time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.parallel import collectives, data, fp8, fp8_weights, tensor
from engine.parallel.collectives import Work

Collective = Callable[..., Work]


@dataclass
class Traffic:
    """What was sent within `late`: the events in order, and how many elements and bytes each collective was given."""

    events: list[str] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    nbytes: list[tuple[str, int]] = field(default_factory=list)

    def total_bytes(self, name: str) -> int:
        """Bytes given to all collectives of this name."""
        return sum(size for given, size in self.nbytes if given == name)


@contextmanager
def late() -> Iterator[Traffic]:
    """Within, the engine's collectives are late; at the end every one must have been waited for, once."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name in ("all_gather", "reduce_scatter", "all_reduce", "all_max"):
            replacement = _late(name, getattr(collectives, name), traffic)
            for module in (collectives, data, fp8, fp8_weights, tensor):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        yield traffic
    kinds = [event.split()[0] for event in traffic.events]
    assert kinds.count("start") == kinds.count("wait"), "a collective was not waited for"


def _late(name: str, collective: Collective, traffic: Traffic) -> Collective:
    def start(out: Tensor, *rest: Tensor | ProcessGroup) -> Work:
        traffic.events.append(f"start {name}")
        return _Late(name, collective, traffic, out, *rest)

    return start


class _Late:
    """A collective under way: `collective(out, x, group)`, or `collective(x, group)` in place."""

    def __init__(self, name: str, collective: Collective, traffic: Traffic, out: Tensor, *rest) -> None:
        *source, group = rest
        self.name, self.traffic, self.out = name, traffic, out
        self.result, self.x = torch.empty_like(out), source[0] if source else out
        self.given = self.x.clone()
        traffic.elements.append(self.x.numel())
        traffic.nbytes.append((name, self.x.nbytes))
        if source:
            self.under_way = collective(self.result, self.given.clone(), group)
        else:
            self.under_way = collective(self.result.copy_(out), group)
        with torch.no_grad():
            out.fill_(torch.nan if out.is_floating_point() else 127)  # of bytes: what FP8 has no number for
            if name == "all_gather":  # x may be a part of out, and keeps its values
                self.x.copy_(self.given)
            elif _overlap(out, self.x):
                self.x.fill_(torch.nan)
                self.given.fill_(torch.nan)

    def wait(self) -> None:
        self.traffic.events.append(f"wait {self.name}")
        self.under_way.wait()
        assert torch.equal(self.x.nan_to_num(), self.given.nan_to_num()), f"{self.name}: written before it was done"
        with torch.no_grad():
            self.out.copy_(self.result)


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@contextmanager
def late_messages() -> Iterator[None]:
    """Within, messages between two ranks are late; at the end every one must be known to have left."""
    sent: list[_LateSend] = []

    def isend(tensor: Tensor, dst: int, group: ProcessGroup) -> _LateSend:
        sent.append(_LateSend(tensor, real_isend(tensor, dst, group)))
        return sent[-1]

    def irecv(tensor: Tensor, src: int, group: ProcessGroup) -> _LateReceive:
        result = torch.empty_like(tensor)
        tensor.fill_(torch.nan)
        return _LateReceive(tensor, result, real_irecv(result, src, group))

    real_isend, real_irecv = dist.isend, dist.irecv
    with patch.object(dist, "isend", isend), patch.object(dist, "irecv", irecv):
        yield
    assert all(send.done for send in sent), "a message was not waited for"


class _LateSend:
    def __init__(self, tensor: Tensor, under_way: dist.Work) -> None:
        self.tensor, self.given, self.under_way, self.done = tensor, tensor.clone(), under_way, False

    def is_completed(self) -> bool:
        return False  # as gloo says until it is asked to wait

    def wait(self) -> None:
        self.under_way.wait()
        assert torch.equal(self.tensor, self.given), "isend: written before it was done"
        self.done = True


@dataclass
class _LateReceive:
    out: Tensor
    result: Tensor
    under_way: dist.Work

    def wait(self) -> None:
        self.under_way.wait()
        self.out.copy_(self.result)

"""Collectives whose results come when they are waited for, and never before.

Communication that is fast enough hides a missing wait: the result is there anyway. Here a result is NaN until `wait`,
and what must not be touched before is looked at then, so a wait too few or too late fails every time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.parallel import collectives, data, tensor
from engine.parallel.collectives import Pending

Collective = Callable[..., Pending]


@dataclass
class Traffic:
    """What was sent within `late`: the events in order, and how many elements each collective was given."""

    events: list[str] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)


@contextmanager
def late() -> Iterator[Traffic]:
    """Within, the engine's collectives are late."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            replacement = _late(name, getattr(collectives, name), traffic)
            for module in (collectives, data, tensor):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        yield traffic


def _late(name: str, collective: Collective, traffic: Traffic) -> Collective:
    def start(out: Tensor, *rest: Tensor | ProcessGroup) -> Pending:
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
        if source:
            self.under_way = collective(self.result, self.given.clone(), group)
        else:
            self.under_way = collective(self.result.copy_(out), group)
        with torch.no_grad():
            out.fill_(torch.nan)
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

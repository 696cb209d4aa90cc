"""The tape of one recorded rank: what it launched, waited for and computed, and which memory is under way meanwhile.

A dispatch mode sees every operator. Each is counted, and held against the byte ranges of the operations that were
launched and not waited for: reading what is being written, or writing what is being read or written, is a problem on
any hardware, whatever the timing. Views and allocations touch no memory. Alternative considered: hooks in the engine,
which would have to be kept complete.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from engine.parallel.pipeline.schedules import Action, ActionKind, Schedule
from engine.testing.communication import Compute, Event, Group, HostSync, Launch, Record, Wait

_ENGINE = Path(engine.__file__).parent
_TRANSPARENT = ("parallel/collectives.py", "parallel/agreement.py", "testing/")  # the caller is the one before these
Range = tuple[int, int, int]
"""A storage, and the first byte and the byte after the last one in it."""


@dataclass(frozen=True)
class _UnderWay:
    """An operation that was launched and not waited for; `tensors` stay alive so that their memory is not reused."""

    launch: Launch
    reads: tuple[Range, ...]
    writes: tuple[Range, ...]
    tensors: tuple[Tensor, ...]

    def storages(self) -> list[int]:
        return [storage for storage, _, _ in self.reads + self.writes]


class Tape:
    """Events and problems of one rank.

    Attributes:
        shared: equal events of all ranks, kept once.
    """

    def __init__(self, rank: int, device: torch.device, shared: dict[Event, Event]) -> None:
        self.rank, self.device, self.shared = rank, device, shared
        self.events: list[Event] = []
        self.problems: dict[str, None] = {}  # in order, each once
        self.under_way: dict[int, _UnderWay] = {}
        self.busy: Counter[int] = Counter()  # storages that operations under way touch
        self.operators = 0
        self._launches = 0

    def record(self) -> Record:
        self._flush()
        return Record(self.rank, tuple(self.events), tuple(self.problems))

    def note(self, event: Event) -> None:
        self._flush()
        self.events.append(self.shared.setdefault(event, event))

    def host_sync(self) -> None:
        self.note(HostSync(caller()))

    def launch(
        self,
        kind: str,
        group: Group,
        tensor: Tensor,
        *,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        detail: str = "",
        peer: int | None = None,
    ) -> int:
        """Note an operation on `tensor`, which the members agree on; return its number."""
        launch = Launch(
            number=self._launches,
            kind=kind,
            group=group,
            detail=detail,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=tensor.numel() * tensor.element_size(),
            peer=peer,
            message=None if peer is None else message(kind),
            caller=caller(),
        )
        self._launches += 1
        ranges = _ranges(reads), _ranges(writes)
        # A communicator (of a group, or of two of its ranks) runs its operations in order, beside those of others.
        others = [work for work in self.under_way.values() if (work.launch.group, work.launch.peer) != (group, peer)]
        self._check(f"{kind} on {group.axis}", others, *ranges)
        self.note(launch)
        self.under_way[launch.number] = work = _UnderWay(launch, *ranges, (*reads, *writes))
        self.busy.update(work.storages())
        return launch.number

    def wait(self, number: int) -> None:
        self.note(Wait(number, caller()))
        if work := self.under_way.pop(number, None):
            self.busy = +(self.busy - Counter(work.storages()))

    def check_operator(self, name: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Hold an operator against what is under way."""
        self._check(name, self.under_way.values(), _ranges(read), _ranges(written))

    def _check(
        self, name: str, works: Iterable[_UnderWay], reads: tuple[Range, ...], writes: tuple[Range, ...]
    ) -> None:
        for work in works:
            for does, own, what, theirs in (
                ("reads", reads, "writes", work.writes),
                ("writes", writes, "writes", work.writes),
                ("writes", writes, "reads", work.reads),
            ):
                if theirs and any(_overlap(a, b) for a in own for b in theirs):
                    launch = work.launch
                    self.problems[
                        f"{name} at {caller()} {does} memory that {launch.kind} on {launch.group.axis} "
                        f"({launch.message or launch.dtype}, launched at {launch.caller}) still {what}"
                    ] = None

    def _flush(self) -> None:
        if self.operators:
            event: Event = Compute(self.operators)
            self.events.append(self.shared.setdefault(event, event))
            self.operators = 0


class OperatorWatch(TorchDispatchMode):
    """Shows every operator to a tape. On a device other than the host it also notes where the host waits, and answers
    what it reads there with ones, because the meta device has no values.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.on_host = tape.device.type == "cpu"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping the compiler out would cost more than all operators."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        access = _access(func)
        tape = self.tape
        if access.computes and (self.on_host or _on_device(args, tape.device)):
            tape.operators += 1
            if tape.busy:
                touched = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
                if any(tensor.untyped_storage()._cdata in tape.busy for tensor in touched):
                    tape.check_operator(access.name, *access.split(args, kwargs))
        if not self.on_host and access.may_wait:
            return self._copied(func, args, kwargs)
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy between devices, or a number read from the device."""
        here, device = args[0], self.tape.device.type
        if func is torch.ops.aten._local_scalar_dense.default:
            if here.device.type != device:
                return func(*args)
            self.tape.host_sync()
            return torch.ones((), dtype=here.dtype).item()
        source = args[1] if func is torch.ops.aten.copy_.default else here
        target = here.device if source is not here else kwargs.get("device") or here.device
        waits = source.device != target and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        if waits and device in (source.device.type, target.type):
            self.tape.host_sync()
        if source.device.type == device != target.type:
            if source is not here:
                return here.fill_(1)
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Access:
    """What an operator does with memory: the positions and names of the arguments that it writes."""

    name: str
    computes: bool
    may_wait: bool
    positions: frozenset[int]
    names: frozenset[str]

    def split(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that it reads, and those that it writes."""
        read: list[Tensor] = []
        written: list[Tensor] = []
        for position, value in enumerate(args):
            (written if position in self.positions else read).extend(_tensors(value))
        for name, value in kwargs.items():
            (written if name in self.names else read).extend(_tensors(value))
        return read, written


@cache
def _access(func: Any) -> _Access:
    schema = func._schema
    writes = [
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    aten = torch.ops.aten
    return _Access(
        name=str(func),
        computes=not func.is_view and "empty" not in schema.name,
        may_wait=func in (aten._local_scalar_dense.default, aten._to_copy.default, aten.copy_.default),
        positions=frozenset(i for i, _ in writes),
        names=frozenset(name for _, name in writes),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _on_device(args: Any, device: torch.device) -> bool:
    """Whether an operator runs on the device; one without tensors creates some, which is not a computation."""
    return any(tensor.device.type == device.type for tensor in _tensors(args))


def _ranges(tensors: Iterable[Tensor]) -> tuple[Range, ...]:
    return tuple(_range(tensor) for tensor in tensors if tensor.numel())


def _range(tensor: Tensor) -> Range:
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        extent = int(tensor.numel())
    else:
        extent = 1 + sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage()._cdata, begin, begin + extent * size


def _overlap(a: Range, b: Range) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def caller() -> str:
    """The engine's file, line and function that communicates."""
    for frame in _frames():
        if place := _place(frame.f_code.co_filename):
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.11
            return f"{place}:{frame.f_lineno} {name}"
    return "outside of the engine"


@cache
def _place(filename: str) -> str | None:
    path = Path(filename)
    if not path.is_relative_to(_ENGINE):
        return None
    place = path.relative_to(_ENGINE).as_posix()
    return None if place.startswith(_TRANSPARENT) else f"engine/{place}"


def message(kind: str) -> str | None:
    """The action that needs the message of a send or receive; None outside of a schedule.

    It is found in the frames of the executor: the local variable `action`, and `schedule` and `stage` of its `self`.
    """
    for frame in _frames():
        if "action" not in frame.f_code.co_varnames:
            continue
        found = frame.f_locals
        action = found.get("action")
        if isinstance(action, Action):
            run: Any = found["self"]
            return str(action if kind == "recv" else _needed_by(run.schedule, run.stage, action))
    return None


def _needed_by(schedule: Schedule, stage: int, action: Action) -> Action:
    """The action of another stage that needs the result of `action`."""
    target = schedule.target(stage, action)
    assert target is not None
    forward = action.kind is ActionKind.FORWARD
    return next(
        other
        for other in schedule.actions[target[0]]
        if (other.microbatch, other.chunk) == (action.microbatch, target[1])
        and (other.kind is ActionKind.FORWARD) == forward
        and other.kind is not ActionKind.BACKWARD_WEIGHT
    )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back

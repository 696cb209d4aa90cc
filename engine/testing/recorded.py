"""Every rank of a layout, one after another in this process, through the engine's real code.

The ranks join a `torch.distributed` backend that only records (`recording_group.py`), so a program that would need
1,024 GPUs runs on one core, on the CPU or, without memory and values, on the meta device. What comes out are the
programs of the ranks as values (`communication.py`), to be held against each other. The collectives take the calls that
they take on NCCL.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import engine.parallel.layout
import engine.train.step
from engine.config.schema import Config
from engine.parallel.layout import Layout, World, build_process_groups, init_distributed
from engine.parallel.pipeline.check import check_schedule
from engine.model.parameters import kv_replicas
from engine.testing.communication import Event, NewGroup, Record
from engine.testing.recording_group import CONTROL, Control, RecordingGroup
from engine.testing.runs import random_batches
from engine.testing.tape import Tape, Watch
from engine.train.inputs import model_dtype
from engine.train.state import state_slices
from engine.train.step import build_model, train_step

T = TypeVar("T")
BACKEND = "recording"


@dataclass(frozen=True)
class Recorded(Generic[T]):
    """What a rank did, and what its program returned."""

    record: Record
    result: T


def record_ranks(
    world_size: int,
    program: Callable[[], T],
    *,
    ranks: Iterable[int] | None = None,
    device: str = "cpu",
    control: Control | None = None,
) -> list[Recorded[T]]:
    """Run `program` as each rank of a world of `world_size`, and return what the ranks did, in their order.

    Args:
        program: connects by `init_distributed`, which finds its rank in the environment as under torchrun.
        ranks: only these; by default all.
        device: "cpu" or "meta".
        control: answers the control group; by default as in a healthy run of equal ranks.
    """
    shared: dict[Event, Event] = {}
    answers = control or EqualRanks()
    with _checked_once():
        return [
            _record_rank(rank, world_size, program, torch.device(device), answers, shared)
            for rank in (range(world_size) if ranks is None else ranks)
        ]


def record_training(
    config: Config, layout: Layout, *, steps: int = 2, ranks: Iterable[int] | None = None, device: str = "cpu"
) -> list[Record]:
    """Record `train_layout` on the ranks of `layout`."""
    program = partial(train_layout, config, layout, steps=steps)
    return [rank.record for rank in record_ranks(layout.world_size, program, ranks=ranks, device=device)]


def train_layout(config: Config, layout: Layout, *, steps: int = 2) -> list[float]:
    """The program of a rank: some steps on random tokens, an evaluation, and reading what it would save.

    Returns:
        this rank's part of the loss of each step; empty on the meta device, which has no values.
    """
    world = init_distributed(config.run.device)
    world = build_process_groups(world, layout, kv_replicas=kv_replicas(config.model, layout.tp))
    dtype = model_dtype(config.precision.mode, "cpu" if world.device.type == "cpu" else "cuda")
    on_meta = world.device.type == "meta"
    model, optimizer = build_model(config, world, dtype, seed=None if on_meta else config.run.seed)
    batches = random_batches(config, dp_rank=world.coords.dp, dp_size=layout.dp)
    tokens = config.batch.global_ * config.data.seq_length
    results = [
        train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=tokens) for step in range(1, steps + 1)
    ]
    with torch.no_grad():
        world.sum_on_device(model.evaluate(batches))
    optimizer.parameters.finish_gathering()
    for _ in state_slices(optimizer, model.fp8):
        pass
    return [] if on_meta else [result.loss.item() for result in results]


class EqualRanks:
    """A control group whose answers are those of a healthy run in which every data-parallel rank has the same numbers.

    The first rank to run (rank 0, which counts its sequences) decides the answers of all.
    """

    def __init__(self) -> None:
        self.answers: list[Tensor] = []
        self.next: dict[int, int] = {}

    def all_reduce(self, rank: int, tensor: Tensor) -> None:
        raise NotImplementedError

    def broadcast(self, rank: int, tensor: Tensor, source: int) -> None:
        raise NotImplementedError


def _record_rank(
    rank: int, world_size: int, program: Callable[[], T], device: torch.device, control: Control, shared: dict[Event, Event]
) -> Recorded[T]:
    tape = Tape(rank, device, shared)
    with _as_rank(rank, world_size, tape, control), Watch(tape):
        result = program()
    return Recorded(tape.record(), result)


@contextmanager
def _as_rank(rank: int, world_size: int, tape: Tape, control: Control) -> Iterator[None]:
    """Be `rank`: its environment, its default process group, and its device."""
    sizes = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % 8, "LOCAL_WORLD_SIZE": min(world_size, 8)}
    new_group = dist.new_group

    def make(ranks: Sequence[int] | None = None, backend: str | None = None, **options: Any) -> Any:
        axis = CONTROL if backend == "gloo" else options.get("group_desc") or "unnamed"
        group = new_group(ranks, **options)
        if isinstance(group, RecordingGroup):
            group.name_axis(axis)
            tape.note(NewGroup(group.group))
        return group

    def create(options: Any, _: Any) -> RecordingGroup:
        ranks = tuple(options.global_ranks_in_group) or tuple(range(world_size))
        return RecordingGroup(tape, control, options.group_id, ranks, options.group_rank)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda", "meta"])
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {name: str(size) for name, size in sizes.items()}))
        stack.enter_context(mock.patch.object(dist, "new_group", make))
        if tape.device.type != "cpu":
            choose = lambda wanted, local_rank: tape.device
            stack.enter_context(mock.patch.object(engine.parallel.layout, "choose_device", choose))
        if world_size > 1:
            dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=dist.HashStore())
            stack.callback(_leave)
            assert isinstance(dist.group.WORLD, RecordingGroup)
            dist.group.WORLD.name_axis("world")
            tape.note(NewGroup(dist.group.WORLD.group))
        yield


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _checked_once() -> Iterator[None]:
    """Prove each schedule once, not on every rank."""
    with mock.patch.object(engine.train.step, "check_schedule", cache(check_schedule)):
        yield

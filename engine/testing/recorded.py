"""Every rank of a layout in this process, one at a time, through the engine's real code.

The ranks join a `torch.distributed` backend that only records (`recording_group.py`), so a program that would need
1,024 GPUs runs on one core: on the CPU, or on the meta device, without memory and values, where operators take the
branches that they take on a GPU. The collectives take the calls that they take on NCCL. What comes out are the programs
of the ranks as values (`communication.py`), to be held against each other. Alternative considered: processes with a
backend that does nothing, which have to agree on every decision and need the memory of all ranks at once.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

import engine.parallel.layout
import engine.train.step
from engine.config.schema import Config
from engine.model.parameters import kv_replicas
from engine.ops import native
from engine.parallel.layout import Layout, build_process_groups, init_distributed, shutdown_distributed
from engine.parallel.pipeline.check import check_schedule
from engine.testing.communication import Event, NewGroup, Phase, Record
from engine.testing.recording_group import RecordingGroup
from engine.testing.runs import random_batches
from engine.testing.tape import OperatorWatch, Tape
from engine.testing.turns import EqualRanks, Turns
from engine.train.inputs import model_dtype
from engine.train.state import state_slices
from engine.train.step import build_model, train_step

_T = TypeVar("_T")
BACKEND = "recording"
_NODE = 8  # ranks of a node, as the environment tells


@dataclass(frozen=True)
class Recorded(Generic[_T]):
    """What a rank did, and what its program returned."""

    record: Record
    result: _T


def record_ranks(
    world_size: int,
    program: Callable[[], _T],
    *,
    ranks: Iterable[int] | None = None,
    device: str = "cpu",
    turns: Turns | None = None,
) -> list[Recorded[_T]]:
    """Run `program` as each rank of a world of `world_size`, and return what the ranks did, in their order.

    Args:
        program: connects by `init_distributed`, which finds its rank in the environment as under torchrun.
        ranks: only these; by default all.
        device: "cpu" or "meta".
        turns: by default one rank after another.
    """
    session = _Session(world_size, torch.device(device), turns or EqualRanks(world_size))
    with _installed(session):
        return session.turns.run(
            range(world_size) if ranks is None else list(ranks), partial(session.record, program), session.enter
        )


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
    replicas, wraps = kv_replicas(config.model, layout.tp), config.parallel.virtual_stages > 1
    world = build_process_groups(world, layout, kv_replicas=replicas, wraps=wraps, tied=config.model.tie_embeddings)
    on_meta = world.device.type == "meta"
    dtype = model_dtype(config.precision.mode, "cuda" if on_meta else "cpu")
    model, optimizer = build_model(config, world, dtype, seed=None if on_meta else config.run.seed)
    batches = random_batches(config, dp_rank=world.coords.dp, dp_size=layout.dp)
    tokens = config.batch.global_ * config.data.seq_length
    results = []
    for step in range(1, steps + 1):
        begin_phase(f"step {step}")
        results.append(train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=tokens))
    begin_phase("evaluation")
    with torch.no_grad():
        world.sum_on_device(model.evaluate(batches))
    optimizer.parameters.finish_gathering()
    for _ in state_slices(optimizer, model.fp8):
        pass
    return [] if on_meta else [result.loss.item() for result in results]


def begin_phase(name: str) -> None:
    """Note what the program does from here on; nothing where there is one rank, which communicates with nobody."""
    if isinstance(group := dist.group.WORLD, RecordingGroup):
        group.tape.note(Phase(name))


class _Session:
    """The ranks of one recording. `tape` is that of the rank whose turn it is."""

    def __init__(self, world_size: int, device: torch.device, turns: Turns) -> None:
        self.world_size, self.device, self.turns = world_size, device, turns
        self.tapes: dict[int, Tape] = {}
        self.shared: dict[Event, Event] = {}

    def enter(self, rank: int) -> None:
        self.tape = self.tapes.setdefault(rank, Tape(rank, self.device, self.shared))
        names = {"RANK": rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": rank % _NODE}
        names["LOCAL_WORLD_SIZE"] = min(self.world_size, _NODE)
        os.environ.update({name: str(value) for name, value in names.items()})

    def record(self, program: Callable[[], _T], rank: int) -> Recorded[_T]:
        tape = self.tape
        if self.world_size > 1:
            dist.init_process_group(BACKEND, rank=rank, world_size=self.world_size, store=HashStore())
            self.named(dist.group.WORLD, "world")
        try:
            with OperatorWatch(tape):
                result = program()
        finally:
            shutdown_distributed()
        return Recorded(tape.record(), result)

    def create(self, options: Any, _: Any) -> RecordingGroup:
        """Make a process group; PyTorch calls it."""
        ranks = tuple(options.global_ranks_in_group) or tuple(range(self.world_size))
        return RecordingGroup(self.tape, self.turns, options.group_id, ranks, options.group_rank)

    def named(self, group: Any, axis: str) -> Any:
        if isinstance(group, RecordingGroup):  # else this rank is not a member
            group.name_axis(axis)
            self.tape.note(NewGroup(group.group))
        return group


@contextmanager
def _installed(session: _Session) -> Iterator[None]:
    """Put what the session needs into place: a backend, also for the control group; a device; one proof a schedule."""
    new_group = dist.new_group

    def make(ranks: Sequence[int] | None = None, *, backend: str | None = None, **options: Any) -> Any:
        axis = "control" if backend == "gloo" else options.get("group_desc") or "unnamed"
        return session.named(new_group(ranks, **options), axis)

    dist.Backend.register_backend(BACKEND, session.create, extended_api=True, devices=["cpu", "cuda", "meta"])
    with ExitStack() as stack:
        put = lambda where, name, value: stack.enter_context(mock.patch.object(where, name, value))  # noqa: E731
        stack.enter_context(mock.patch.dict(os.environ))
        put(sys, "excepthook", sys.excepthook)  # each start of a process group replaces it
        put(dist, "new_group", make)
        put(engine.train.step, "check_schedule", cache(check_schedule))
        if session.device.type == "meta":
            put(engine.parallel.layout, "choose_device", lambda wanted, local_rank: session.device)
            put(native, "runs", _runs_on_meta)
        yield


def _runs_on_meta(x: torch.Tensor) -> bool:
    """As `native.runs` with a GPU: the shape functions of csrc's operators stand for their kernels."""
    return x.is_meta and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and not native.WHY_NOT

"""The rank grid: which rank sits where, and the process groups that connect it.

`Layout` is pure arithmetic on a frozen value, so that it can be tested, printed and planned with for any number of
GPUs without a single process. `World` adds what one live process knows of itself. Rejected: module-level process
groups, because they are a hidden input to every function.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import ConfigError

AXES = ("pp", "dp", "cp", "tp")  # slowest to fastest: tensor-parallel peers share a node


@dataclass(frozen=True)
class Coordinates:
    """Where a rank sits on each axis."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has.

    Raises:
        ConfigError: an axis is smaller than 1.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"{axis} = {getattr(self, axis)} ranks; every axis needs at least 1")

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` sits. The inverse of `rank_at`."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(pp, dp, cp, tp)

    def rank_at(self, at: Coordinates) -> int:
        return ((at.pp * self.dp + at.dp) * self.cp + at.cp) * self.tp + at.tp

    def peers(self, rank: int, axis: str) -> list[int]:
        """Ranks that differ from `rank` only along `axis`, in order."""
        here = self.coordinates(rank)
        return [self.rank_at(replace(here, **{axis: i})) for i in range(getattr(self, axis))]


@dataclass(frozen=True)
class World:
    """One live rank: its place, its device and its connections.

    `dp_group` moves tensors of `device`; `control_group` moves a few host numbers (token counts, stop requests)
    without touching the device's queue. Both are None when there is a single rank.
    """

    layout: Layout
    rank: int
    local_rank: int
    local_size: int
    device: torch.device
    dp_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None

    @property
    def at(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def is_main(self) -> bool:
        """The rank that writes logs."""
        return self.rank == 0

    def sum_on_host(self, numbers: list[int]) -> list[int]:
        """Element-wise sum over all ranks; a collective."""
        if self.control_group is None:
            return numbers
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.control_group)
        return total.tolist()

    def first_problem(self, problem: str | None) -> str | None:
        """The problem of the lowest rank that has one, the same answer on every rank; a collective."""
        if self.control_group is None:
            return problem
        size = self.layout.world_size
        lengths = [0] * size
        text = b"" if problem is None else f"rank {self.rank}: {problem}".encode()
        lengths[self.rank] = len(text)
        lengths = self.sum_on_host(lengths)
        if not any(lengths):
            return None
        speaker = next(rank for rank, length in enumerate(lengths) if length)
        message = torch.zeros(lengths[speaker], dtype=torch.uint8)
        if self.rank == speaker:
            message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(message, src=speaker, group=self.control_group)
        return bytes(message.tolist()).decode()


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device = {wanted}: local rank {local_rank} needs GPU {local_rank}, this machine shows "
            f"{torch.cuda.device_count()}; start fewer ranks (--nproc-per-node) or set run.device = cpu"
        )
    return torch.device("cuda", local_rank)


def connect(device: str, *, timeout_s: int = 1800) -> World:
    """Join the ranks that torchrun started (or stay alone) and build the process groups."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        here = choose_device(device, local_rank)
    except ConfigError as error:
        error.reported_elsewhere = local_rank != 0
        raise
    if here.type == "cuda":
        torch.cuda.set_device(here)
    world = World(Layout(dp=world_size), rank, local_rank, local_size, here)
    if world_size == 1:
        return world
    backend = "nccl" if here.type == "cuda" else "gloo"
    if not dist.is_initialized():
        bound = here if here.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=bound)
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return replace(world, dp_group=dist.group.WORLD, control_group=control)


def disconnect() -> None:
    """Leave the process group; safe to call when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()

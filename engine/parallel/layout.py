"""The rank grid: which rank sits where, and the process groups that connect it.

`Layout` is pure arithmetic on a frozen value, so that it can be tested, printed and planned with for any number of
GPUs without a single process. `World` adds what one live process knows of itself. Alternative considered:
module-level process groups, which are a hidden input to every function.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import ConfigError

CHANNELS = ("forward", "backward", "forward wrap", "backward wrap")
_LOCAL: dict[str, Any] = {"use_local_synchronization": True}  # only the members of a group take part in making it


@dataclass(frozen=True)
class Coordinates:
    """Where a rank sits on each axis."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has; the axes from slowest to fastest, so that tensor-parallel peers share a node.

    Raises:
        ConfigError: an axis is smaller than 1.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if size < 1:
                raise ConfigError(f"{axis} = {size} ranks; every axis needs at least 1")

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
        return [self.rank_at(replace(here, **{axis: i})) for i in range(asdict(self)[axis])]


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel group of a rank; by default a group of one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, total: int) -> tuple[int, int]:
        """Return (start, extent) of this rank's shard of `total`; shards differ by one at most."""
        start = total * self.rank // self.size
        return start, total * (self.rank + 1) // self.size - start


NO_TP = TensorParallel()


@dataclass(frozen=True)
class World:
    """A live rank: its coordinates, device and process groups. A group is None if it would contain only this rank.

    Attributes:
        group: all ranks, for tensors of `device`.
        control_group: all ranks, for a few host numbers (token counts, stop requests) that must not wait for the
            device's queue.
        dp_group, tp_group: the ranks that differ only along that axis.
        kv_group: the tensor-parallel ranks that hold the same key and value heads.
        embedding_group: the first and the last pipeline stage, which share tied embeddings.
        channels: between pipeline stages, one group for each kind of message ("forward", "backward"; "forward wrap" and
            "backward wrap" between the last and the first stage), so that in each pair of ranks a group carries
            messages in one direction only and no message waits for one in the other direction.
    """

    layout: Layout
    rank: int
    local_rank: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    kv_group: dist.ProcessGroup | None = None
    embedding_group: dist.ProcessGroup | None = None
    channels: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)

    @property
    def coords(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def tp(self) -> "TensorParallel":
        return TensorParallel(self.coords.tp, self.layout.tp, self.tp_group)

    @property
    def is_model_parallel_leader(self) -> bool:
        """The one rank that counts a sequence in sums over all ranks, among those that share the layers of a model."""
        return self.coords.pp == 0 and self.coords.tp == 0

    @property
    def is_main(self) -> bool:
        """The rank that writes logs."""
        return self.rank == 0

    def sum_on_device(self, tensor: torch.Tensor) -> None:
        """Element-wise sum over all ranks, in place; a collective."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: `cuda` is requested and there is no GPU for this rank.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device = {wanted}: local rank {local_rank} needs GPU {local_rank}, this machine shows "
            f"{torch.cuda.device_count()}; start fewer ranks (--nproc-per-node) or set run.device = cpu"
        )
    return torch.device("cuda", local_rank)


def init_distributed(device: str, *, timeout_s: int = 1800) -> World:
    """Join the ranks that torchrun started, if it did. All ranks are data-parallel until `build_process_groups`."""
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
    # The group is not bound to the device: NCCL then connects each pair of pipeline stages by itself, and a message
    # to one neighbor does not wait for one to the other.
    if not dist.is_initialized():
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return replace(world, group=dist.group.WORLD, control_group=control)


def build_process_groups(world: World, layout: Layout, *, kv_replicas: int = 1) -> World:
    """Put the connected ranks on a grid and build the groups of its axes; a collective.

    Args:
        kv_replicas: tensor-parallel ranks that hold the same key and value heads, next to each other.
    """
    here = replace(world, layout=layout)
    tensor, stages = layout.peers(here.rank, "tp"), layout.peers(here.rank, "pp")
    first = here.coords.tp // kv_replicas * kv_replicas
    here = replace(
        here,
        dp_group=_group(layout.peers(here.rank, "dp")),
        tp_group=_group(tensor),
        kv_group=_group(tensor[first : first + kv_replicas]),
        channels={} if layout.pp == 1 else {kind: dist.new_group(stages, **_LOCAL) for kind in CHANNELS},
    )
    if layout.pp > 1:
        _connect_stages(here)
    # Last, because not all ranks make it: PyTorch derives a group's name from the number of groups made before.
    at_end = layout.pp > 1 and here.coords.pp in (0, layout.pp - 1)
    return replace(here, embedding_group=_group([stages[0], stages[-1]]) if at_end else None)


def _connect_stages(world: World) -> None:
    """One message over every channel between two stages, in one order everywhere.

    NCCL connects a pair of ranks at its first message, and both wait for the other; in the middle of a schedule they
    would wait for each other over different channels.
    """
    stages, here, token = world.layout.peers(world.rank, "pp"), world.coords.pp, torch.zeros(1, device=world.device)
    last = len(stages) - 1
    neighbors = [(i, i + 1) for i in range(last)]
    for kind, group in world.channels.items():
        for low, high in [(0, last)] if "wrap" in kind else neighbors:
            upwards = kind in ("forward", "backward wrap")
            source, target = (low, high) if upwards else (high, low)
            if here == source:
                dist.send(token, stages[target], group=group)
            elif here == target:
                dist.recv(token, stages[source], group=group)


def _group(ranks: list[int]) -> dist.ProcessGroup | None:
    return dist.new_group(ranks, **_LOCAL) if len(ranks) > 1 else None


def shutdown_distributed() -> None:
    """Leave the process group; safe to call when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""The rank grid: which rank sits where, and the process groups that connect it.

`Layout` is pure arithmetic on a frozen value, so that it can be tested, printed and planned with for any number of
GPUs without a single process. `World` adds what one live process knows of itself. Alternative considered:
module-level process groups, which are a hidden input to every function.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from engine.errors import ConfigError
from engine.parallel.activity import Activity
from engine.parallel.connect import LIMIT_S, Link, Watch, meet

CHANNELS = ("forward", "backward", "forward wrap", "backward wrap")
_SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"
_HIGH_PRIORITY = ("tp", "kv")  # axes whose collectives the computation waits for


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

    def links(self, rank: int, *, kv_replicas: int = 1, wraps: bool = True, tied: bool = True) -> list[Link]:
        """The links of `rank`, in the order in which all ranks connect them; on NCCL each is a communicator.

        A group is one link, and on a channel each pair of neighboring stages, since NCCL connects pairs. Any two links
        come in one order on all ranks that have both, so connecting them one after another cannot block.

        Args:
            kv_replicas: tensor-parallel ranks that hold the same key and value heads, next to each other.
            wraps: the last stage sends to the first, as virtual stages do.
            tied: the first and the last stage share tied embeddings.
        """
        tensor, stages = self.peers(rank, "tp"), self.peers(rank, "pp")
        at, last = self.coordinates(rank), self.pp - 1
        first = at.tp // kv_replicas * kv_replicas
        groups = {
            "world": list(range(self.world_size)),
            "dp": self.peers(rank, "dp"),
            "tp": tensor,
            "kv": tensor[first : first + kv_replicas],
        }
        found = [Link(axis, tuple(ranks)) for axis, ranks in groups.items() if len(ranks) > 1]
        found += [
            Link(channel, (stages[source], stages[target]))
            for channel in channels(self.pp, wraps)
            for source, target in _messages(channel, last)
            if at.pp in (source, target)
        ]
        return found + [Link("tied_embedding", (stages[0], stages[-1]))] * (tied and last > 0 and at.pp in (0, last))


def channels(pp: int, wraps: bool) -> tuple[str, ...]:
    """The channels between `pp` stages; those that wrap around are needed only for virtual stages."""
    return CHANNELS[: 0 if pp == 1 else 4 if wraps else 2]


def _messages(channel: str, last: int) -> Iterator[tuple[int, int]]:
    """Yield the (source, target) stages of a channel; `last` is the last stage."""
    upwards = channel in ("forward", "backward wrap")
    for low, high in [(0, last)] if "wrap" in channel else [(i, i + 1) for i in range(last)]:
        yield (low, high) if upwards else (high, low)


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
        timeout_s: of all groups.
        connect_timeout_s: after which a link that does not answer at the start ends the process.
        store: the key-value store over which the ranks have met.
        activity: what this rank is doing.
        links: what this rank has connected, in that order.
        connect_s: seconds that connecting took.
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
    timeout_s: int = 1800
    connect_timeout_s: float = LIMIT_S
    store: Store | None = None
    activity: Activity = field(default_factory=Activity, compare=False, repr=False)
    links: tuple[Link, ...] = ()
    connect_s: float = 0.0

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
    """The device of this rank: `auto`, `cpu` or `cuda`. Ranks share GPUs only where NCCL is told to allow it.

    Raises:
        ConfigError: `cuda` is requested and there is no GPU for this rank.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank < gpus * ranks_per_gpu(local_rank + 1):
        return torch.device("cuda", local_rank % gpus)
    raise ConfigError(
        f"run.device = {wanted}: local rank {local_rank} needs GPU {local_rank}, this machine shows {gpus}; start "
        f"fewer ranks (--ranks, torchrun's --nproc-per-node), set run.device = cpu or, for tests with NCCL 2.30 or "
        f"newer, let ranks share a GPU ({_SHARED_GPUS}=1)"
    )


def ranks_per_gpu(local_size: int) -> int:
    """The most ranks on one GPU, if `local_size` ranks run on this machine; 1 unless NCCL_MULTI_RANK_GPU_ENABLE is 1.

    The variable is NCCL's own (2.30 and newer, experimental): without it NCCL refuses ranks that share a GPU.
    """
    shared = os.environ.get(_SHARED_GPUS) == "1"
    return -(-local_size // max(torch.cuda.device_count(), 1)) if shared else 1


def init_distributed(device: str, *, timeout_s: int = 1800, connect_timeout_s: float = LIMIT_S) -> World:
    """Join the ranks that torchrun started, if it did. All ranks are data-parallel until `build_process_groups`.

    Args:
        timeout_s: of all groups, in seconds; also how long the first rank waits for the last one to start.
        connect_timeout_s: seconds after which a link that does not answer ends the process.

    Raises:
        PeerError: not all ranks have started in time, or they cannot reach each other.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        here = choose_device(device, local_rank)
    except ConfigError as error:
        error.reported_elsewhere = local_rank != torch.cuda.device_count()  # the first one that has no GPU
        raise
    if here.type == "cuda":
        torch.cuda.set_device(here)
    world = World(
        Layout(dp=world_size),
        rank,
        local_rank,
        local_size,
        here,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
    )
    if world_size == 1:
        return world
    store = _get_default_store() if dist.is_initialized() else meet(rank, world_size, timeout_s=timeout_s)
    started, timeout, everyone = time.perf_counter(), timedelta(seconds=timeout_s), tuple(range(world_size))
    with Watch(store, rank, connect_timeout_s) as watch:
        # The group is not bound to the device: NCCL then connects each pair of pipeline stages by itself, and a message
        # to one neighbor does not wait for one to the other.
        if not dist.is_initialized():
            watch.begin(Link("world", everyone))
            backend = "nccl" if here.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        watch.begin(Link("control", everyone))
        control = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
    connect_s = time.perf_counter() - started
    return replace(world, group=dist.group.WORLD, control_group=control, store=store, connect_s=connect_s)


def build_process_groups(
    world: World,
    layout: Layout,
    *,
    kv_replicas: int = 1,
    wraps: bool = True,
    tied: bool = True,
) -> World:
    """Put the connected ranks on a grid, build the groups of its axes and connect every link; a collective.

    The process ends with exit code 69 if a link does not answer within `world.connect_timeout_s`. By default there are
    groups for all models and schedules; `kv_replicas`, `wraps` and `tied` are those of `Layout.links`.

    Raises:
        PeerError: the backend reports that a link has failed.
    """
    here = replace(world, layout=layout)
    if world.store is None:
        return here
    links = layout.links(here.rank, kv_replicas=kv_replicas, wraps=wraps, tied=tied)
    started = time.perf_counter()
    with Watch(world.store, here.rank, world.connect_timeout_s, world.activity) as watch:
        groups = _new_groups(here, links, channels(layout.pp, wraps), watch)
        _connect(here, links, groups, watch)
    return replace(
        here,
        dp_group=groups.get("dp"),
        tp_group=groups.get("tp"),
        kv_group=groups.get("kv"),
        embedding_group=groups.get("tied_embedding"),
        channels={channel: groups[channel] for channel in channels(layout.pp, wraps)},
        links=tuple(links),
        connect_s=here.connect_s + time.perf_counter() - started,
    )


def _new_groups(world: World, links: list[Link], wanted: tuple[str, ...], watch: Watch) -> dict[str, dist.ProcessGroup]:
    """Make the groups of this rank, by axis.

    All ranks make them in one order, since PyTorch derives a group's name from the number of groups made before; for
    the same reason the group of tied embeddings, which not all ranks make, is the last.
    """
    assert world.group is not None
    stages = tuple(world.layout.peers(world.rank, "pp"))
    members = [link for link in links if link.axis in ("dp", "tp", "kv")]
    members += [Link(channel, stages) for channel in wanted]
    members += [link for link in links if link.axis == "tied_embedding"]
    groups, timeout = {"world": world.group}, timedelta(seconds=world.timeout_s)
    for link in members:
        watch.begin(link)
        groups[link.axis] = dist.new_group(
            list(link.ranks),
            timeout=timeout,
            pg_options=_options(dist.get_backend(world.group), link.axis, timeout),
            use_local_synchronization=True,  # only the members of a group take part in making it
            group_desc=link.axis,
        )
    return groups


def _options(backend: str, axis: str, timeout: timedelta) -> Any:
    """Options of an NCCL group whose kernels go before the matmuls that run beside them; None for the default ones."""
    if backend != "nccl" or axis not in _HIGH_PRIORITY:
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # PyTorch warns if it is not the timeout of the group
    return options


def _connect(world: World, links: list[Link], groups: Mapping[str, dist.ProcessGroup], watch: Watch) -> None:
    """One tiny operation over every link, in one order everywhere.

    NCCL makes a communicator at its first operation, and all its ranks wait for each other; in the middle of a schedule
    they would wait for each other over different links. An unreachable link shows here and not in a later step.
    """
    token = torch.zeros(1, device=world.device)
    for link in links:
        watch.begin(link)
        work = _exchange(token, link, groups[link.axis], world.rank)
        work.wait()
        watch.launched(work)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _exchange(token: torch.Tensor, link: Link, group: dist.ProcessGroup, rank: int) -> dist.Work:
    if link.axis not in CHANNELS:
        work = dist.all_reduce(token, group=group, async_op=True)
    elif rank == link.ranks[0]:
        work = dist.isend(token, link.ranks[1], group=group)
    else:
        work = dist.irecv(token, link.ranks[0], group=group)
    assert work is not None
    return work


def shutdown_distributed() -> None:
    """Leave the process group; safe to call when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()

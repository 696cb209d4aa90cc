from datetime import timedelta
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from engine.errors import ConfigError
from engine.parallel.connect import Link
from engine.parallel.layout import (
    CHANNELS,
    NO_TP,
    Layout,
    TensorParallel,
    World,
    _options,
    build_process_groups,
    choose_device,
    init_distributed,
    ranks_per_gpu,
)
from engine.testing.distributed import run_ranks

AXES = ("pp", "dp", "cp", "tp")


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=4), Layout(2, 3, 1, 4), Layout(3, 2, 2, 2)])
def test_ranks_and_coordinates_are_inverse_and_tp_is_fastest(layout):
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank_at(at) == rank
        assert all(0 <= getattr(at, axis) < getattr(layout, axis) for axis in AXES)
    assert layout.peers(0, "tp") == list(range(layout.tp))
    assert layout.peers(0, "pp") == [i * layout.world_size // layout.pp for i in range(layout.pp)]


def test_peers_partition_the_world():
    layout = Layout(2, 3, 1, 2)
    for axis in AXES:
        groups = {tuple(layout.peers(rank, axis)) for rank in range(layout.world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


def test_an_axis_without_ranks_is_refused():
    with pytest.raises(ConfigError, match="dp = 0 ranks"):
        Layout(dp=0)


def fail_on_rank_one() -> None:
    if init_distributed("cpu").rank == 1:
        raise ValueError("broken on purpose")


def test_the_failing_rank_is_shown_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*broken on purpose"):
        run_ranks(2, fail_on_rank_one)


def groups(layout: Layout, kv_replicas: int, wraps: bool, tied: bool) -> dict[str, list[int]]:
    """The members of every group of this rank, as the groups themselves report them, once all have really talked."""
    world = build_process_groups(init_distributed("cpu"), layout, kv_replicas=kv_replicas, wraps=wraps, tied=tied)
    named = {"dp": world.dp_group, "tp": world.tp_group, "kv": world.kv_group, "tied_embedding": world.embedding_group}
    named |= world.channels
    assert world.tp == TensorParallel(world.coords.tp, layout.tp, world.tp_group)
    assert {link.axis for link in world.links} - {"world", *CHANNELS} == {
        axis for axis, group in named.items() if group is not None and axis not in CHANNELS
    }
    found = {}
    for name, group in named.items():
        if group is not None:
            members = torch.tensor([1 << world.rank])
            dist.all_reduce(members, group=group)
            found[name] = [rank for rank in range(layout.world_size) if members.item() >> rank & 1]
            assert found[name] == dist.get_process_group_ranks(group)
    return found


STAGES = {
    "pp 4": [[0, 1, 2, 3]],
    "pp 2 tp 2": [[0, 2], [1, 3]],
    "pp 2 dp 2 tp 2": [[0, 4], [1, 5], [2, 6], [3, 7]],
}
GROUPS = {
    "dp 3": {"dp": [[0, 1, 2]]},
    "dp 2 tp 2": {"dp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]},
    "tp 2 kv 2": {"tp": [[0, 1]], "kv": [[0, 1]]},
    "tp 4 kv 2": {"tp": [[0, 1, 2, 3]], "kv": [[0, 1], [2, 3]]},
    "pp 4": {"tied_embedding": [[0, 3]]},
    "pp 2 tp 2": {"tp": [[0, 1], [2, 3]], "tied_embedding": [[0, 2], [1, 3]]},
    "pp 2 dp 2 tp 2": {
        "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "tied_embedding": [[0, 4], [1, 5], [2, 6], [3, 7]],
    },
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("wraps", "tied"), [(False, True), (True, False)])
def test_every_group_has_its_ranks(name, wraps, tied):
    words = name.split()
    sizes = {axis: int(size) for axis, size in zip(words[::2], words[1::2], strict=True)}
    kv_replicas = sizes.pop("kv", 1)
    layout = Layout(**sizes)
    made = dict.fromkeys(CHANNELS if wraps else ("forward", "backward"), STAGES.get(name, []))
    expected = {axis: all_ for axis, all_ in (GROUPS[name] | made).items() if tied or axis != "tied_embedding"}
    for rank, found in enumerate(run_ranks(layout.world_size, groups, layout, kv_replicas, wraps, tied)):
        assert found == {kind: group for kind, all_ in expected.items() for group in all_ if rank in group}


def communicators(layout: Layout, wraps: bool) -> tuple[list[Link], list[Link], list[timedelta]]:
    """The links that this rank was told to connect, those that it has talked over, and the timeouts of its groups."""
    links: list[Link] = []
    axes: dict[Any, str] = {}

    def note(operation: str) -> Any:
        run = getattr(dist, operation)

        def noted(token: torch.Tensor, *peer: int, group: Any, **options: Any) -> Any:
            ranks = dist.get_process_group_ranks(group)
            if peer:
                ranks = [dist.get_rank(), peer[0]] if operation == "isend" else [peer[0], dist.get_rank()]
            links.append(Link(axes.get(group, "world"), tuple(ranks)))
            return run(token, *peer, group=group, **options)

        return patch.object(dist, operation, noted)

    def noted_group(*arguments: Any, **options: Any) -> Any:
        group = new_group(*arguments, **options)
        axes[group] = options["group_desc"]
        return group

    new_group = dist.new_group
    with note("all_reduce"), note("isend"), note("irecv"), patch.object(dist, "new_group", noted_group):
        world = build_process_groups(init_distributed("cpu", timeout_s=77), layout, wraps=wraps)
    backends = [group._get_backend(torch.device("cpu")) for group in axes]
    return list(world.links), links, [backend.options._timeout for backend in backends]


@pytest.mark.parametrize(("layout", "wraps"), [(Layout(pp=2), False), (Layout(pp=3), True), (Layout(2, 2, 1, 2), True)])
def test_every_link_is_used_once_at_the_start_and_all_groups_wait_as_long(layout, wraps):
    for rank, (named, used, timeouts) in enumerate(run_ranks(layout.world_size, communicators, layout, wraps)):
        assert used == named == layout.links(rank, wraps=wraps)
        assert timeouts and set(timeouts) == {timedelta(seconds=77)}


def test_two_stages_have_two_pairs_and_four_with_virtual_stages():
    pairs = [("forward", (0, 1)), ("backward", (1, 0)), ("forward wrap", (1, 0)), ("backward wrap", (0, 1))]
    for rank in range(2):
        for wraps in (False, True):
            found = Layout(pp=2).links(rank, wraps=wraps, tied=False)
            assert found == [Link("world", (0, 1)), *(Link(*pair) for pair in pairs[: 4 if wraps else 2])]


LAYOUTS = [Layout(pp, dp, 1, tp) for pp in (1, 2, 3, 5) for dp in (1, 3) for tp in (1, 4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_links_connected_one_after_another_cannot_block(layout):
    """Each rank waits in its next link until all of the link's ranks are there."""
    for wraps, tied in product((False, True), (False, True)):
        waiting = [
            layout.links(rank, kv_replicas=2 if layout.tp > 1 else 1, wraps=wraps, tied=tied)
            for rank in range(layout.world_size)
        ]
        while any(waiting):
            next_ = {links[0] for links in waiting if links}
            ready = [link for link in next_ if all(waiting[rank][:1] == [link] for rank in link.ranks)]
            assert ready
            for link in ready:
                for rank in link.ranks:
                    waiting[rank].pop(0)


class FakeNccl:
    """NCCL's process group, as far as its options: builds of PyTorch without NCCL do not have it."""

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self._timeout = timedelta(minutes=10)


def test_tensor_parallel_kernels_go_first(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    timeout = timedelta(seconds=5)
    for axis in ("tp", "kv"):
        options = _options("nccl", axis, timeout)
        assert options.is_high_priority_stream and options._timeout == timeout
        assert _options("gloo", axis, timeout) is None
    assert all(_options("nccl", axis, timeout) is None for axis in ("world", "dp", "tied_embedding", *CHANNELS))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [7, 12, 257])
def test_shares_are_contiguous_and_differ_by_one(size, total):
    shares = [TensorParallel(rank, size).share(total) for rank in range(size)]
    end = 0
    for start, extent in shares:
        assert start == end
        assert extent in (total // size, -(-total // size))
        end = start + extent
    assert end == total
    assert NO_TP.share(total) == (0, total)


def test_one_rank_counts_each_sequence():
    layout = Layout(2, 3, 1, 2)
    counting = [World(layout, rank, rank, 12, torch.device("cpu")).is_model_parallel_leader for rank in range(12)]
    assert [layout.coordinates(rank).dp for rank in range(12) if counting[rank]] == [0, 1, 2]


@pytest.fixture
def gpus(monkeypatch):
    """Call it with a number of GPUs that the machine then seems to have."""
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)

    def show(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return show


def test_a_rank_has_a_gpu_of_its_own(gpus):
    gpus(2)
    assert [choose_device("auto", rank).index for rank in range(2)] == [0, 1]
    assert choose_device("cpu", 0).type == "cpu"
    assert [ranks_per_gpu(size) for size in (1, 2, 8)] == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"local rank 2 needs GPU 2, this machine shows 2; .*RANK_GPU_ENABLE=1"):
        choose_device("cuda", 2)


@pytest.mark.parametrize(("count", "silent"), [(0, [False, True, True]), (1, [False, True]), (2, [False])])
def test_the_first_rank_without_a_gpu_says_so(gpus, monkeypatch, count, silent):
    gpus(count)
    seen = []
    for rank in range(count, 3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(ConfigError, match="needs GPU") as failed:
            init_distributed("cuda")
        seen.append(failed.value.reported_elsewhere)
    assert seen == silent


def test_ranks_share_gpus_where_nccl_allows_it(gpus, monkeypatch):
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    gpus(2)
    assert [choose_device("cuda", rank).index for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [ranks_per_gpu(size) for size in (1, 2, 3, 5)] == [1, 1, 2, 3]
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")
    assert ranks_per_gpu(5) == 1
    with pytest.raises(ConfigError, match="local rank 2"):
        choose_device("cuda", 2)


@pytest.mark.parametrize("shared", ["0", "1"])
def test_without_a_gpu_none_is_shared(gpus, monkeypatch, shared):
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", shared)
    gpus(0)
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(ConfigError, match="needs GPU 0, this machine shows 0"):
        choose_device("cuda", 0)

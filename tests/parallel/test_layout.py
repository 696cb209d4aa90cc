import pytest
import torch
import torch.distributed as dist

from engine.errors import ConfigError
from engine.parallel.layout import CHANNELS, NO_TP, Layout, TensorParallel, World, init_distributed
from engine.testing.distributed import run_ranks, world_of

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


def groups(layout: Layout, kv_replicas: int) -> dict[str, list[int]]:
    """The members of every group of this rank, as the groups themselves report them, once all have really talked."""
    world = world_of(layout, kv_replicas=kv_replicas)
    named = {"dp": world.dp_group, "tp": world.tp_group, "kv": world.kv_group, "tied_embedding": world.embedding_group}
    named |= world.channels
    assert world.tp == TensorParallel(world.coords.tp, layout.tp, world.tp_group)
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
def test_every_group_has_its_ranks(name):
    words = name.split()
    sizes = {axis: int(size) for axis, size in zip(words[::2], words[1::2], strict=True)}
    kv_replicas = sizes.pop("kv", 1)
    layout = Layout(**sizes)
    expected = GROUPS[name] | dict.fromkeys(CHANNELS, STAGES.get(name, []))
    for rank, found in enumerate(run_ranks(layout.world_size, groups, layout, kv_replicas)):
        assert found == {kind: group for kind, all_ in expected.items() for group in all_ if rank in group}


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

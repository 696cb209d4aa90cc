import pytest

from engine.errors import ConfigError
from engine.parallel.layout import AXES, Layout, World, connect
from engine.testing.distributed import run_ranks


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


def talk() -> tuple[int, list[int], str | None, str | None]:
    world: World = connect("cpu")
    problem = world.first_problem("disk full" if world.rank in (1, 2) else None)
    return world.at.dp, world.sum_on_host([1, world.rank]), problem, world.first_problem(None)


def test_ranks_agree_on_numbers_and_on_the_first_problem():
    for rank, (dp, numbers, problem, nothing) in enumerate(run_ranks(3, talk)):
        assert (dp, numbers) == (rank, [3, 3])
        assert problem == "rank 1: disk full"
        assert nothing is None


def test_a_lone_rank_needs_no_process_group():
    assert talk() == (0, [1, 0], None, None)


def fail_on_rank_one() -> None:
    if connect("cpu").rank == 1:
        raise ValueError("broken on purpose")


def test_the_failing_rank_is_shown_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*broken on purpose"):
        run_ranks(2, fail_on_rank_one)

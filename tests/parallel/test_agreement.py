import socket

import pytest
import torch.distributed as dist

from engine.errors import DataError
from engine.parallel.agreement import (
    broadcast_ints,
    compute_once,
    first_problem,
    gather_ints,
    leave_together,
    on_all_ranks,
    run_on_all_ranks,
    sum_ints,
)
from engine.parallel.layout import init_distributed
from engine.testing.distributed import run_ranks


def talk() -> tuple[int, list[int], str | None, str | None]:
    world = init_distributed("cpu")
    problem = first_problem(world, f"rank {world.rank}: disk full" if world.rank in (1, 2) else None)
    return world.coords.dp, sum_ints(world, [1, world.rank]), problem, first_problem(world, None)


def test_ranks_agree_on_numbers_and_on_the_first_problem():
    for rank, (dp, numbers, problem, nothing) in enumerate(run_ranks(3, talk)):
        assert (dp, numbers) == (rank, [3, 3])
        assert problem == "rank 1: disk full"
        assert nothing is None


def test_a_lone_rank_needs_no_process_group():
    assert talk() == (0, [1, 0], None, None)


def gather_and_broadcast() -> tuple[list[int], list[int]]:
    world = init_distributed("cpu")
    return gather_ints(world, 10 + world.rank), broadcast_ints(world, [7] * (3 - world.rank))


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_all_numbers_and_those_of_the_first(world_size):
    everyones = list(range(10, 10 + world_size))
    assert run_ranks(world_size, gather_and_broadcast) == [(everyones, [7, 7, 7])] * world_size


def read_what_one_rank_cannot() -> tuple[str, bool]:
    world = init_distributed("cpu")

    def read() -> None:
        if world.rank == world.layout.world_size - 1:
            raise DataError("no such file")

    try:
        run_on_all_ranks(world, read)
    except DataError as error:
        return str(error), error.reported_elsewhere
    return "", False


def test_a_failure_of_one_rank_is_raised_by_all_and_printed_by_the_first():
    said = "rank 2: no such file"
    assert run_ranks(3, read_what_one_rank_cannot) == [(said, False), (said, True), (said, True)]
    assert read_what_one_rank_cannot() == ("no such file", False)


def test_what_works_on_all_ranks_is_returned():
    assert run_on_all_ranks(init_distributed("cpu"), lambda: 5) == 5


def leave(how: str) -> tuple[bool, list[str]]:
    """Whether this rank is still connected after it has left, and the notes of the error with which it did."""
    world = init_distributed("cpu")
    notes: list[str] = []
    try:
        with leave_together(world, lambda: "step 3"):
            if how == "alone" and world.rank == 1:
                raise DataError("no such file")
            if how == "together":
                raise on_all_ranks(world, DataError("no such file"))
    except DataError as error:
        notes = getattr(error, "__notes__", [])
    return dist.is_initialized(), notes


def test_ranks_shut_down_together_and_one_that_fails_alone_does_not():
    assert run_ranks(2, leave, "normally") == [(False, []), (False, [])]
    assert run_ranks(2, leave, "together") == [(False, []), (False, [])]
    assert run_ranks(2, leave, "alone") == [(False, []), (True, [f"rank 1 ({socket.gethostname()}), step 3"])]


def square_of_own_keys() -> tuple[list[int], list[list[int]], list[list[int]]]:
    world = init_distributed("cpu")
    keys = [[5, 9], [9, 7, 5], [], [7, 2**62]][world.rank]
    computed = []

    def compute(index: int) -> list[int]:
        computed.append(keys[index])
        return [-keys[index], 10 + world.rank]

    return computed, compute_once(world, keys, compute, 2), compute_once(world, [], compute, 2)


def test_what_several_ranks_need_is_computed_by_the_first_of_them():
    computed, results, nothing = zip(*run_ranks(4, square_of_own_keys), strict=True)
    assert computed == ([5, 9], [7], [], [2**62])
    of_5, of_9, of_7 = [-5, 10], [-9, 10], [-7, 11]
    assert results == ([of_5, of_9], [of_9, of_7, of_5], [], [of_7, [-(2**62), 13]])
    assert nothing == ([],) * 4


def test_a_lone_rank_computes_for_itself():
    assert square_of_own_keys() == ([5, 9], [[-5, 10], [-9, 10]], [])


def compute_what_fails() -> str:
    world = init_distributed("cpu")

    def compute(index: int) -> list[int]:
        raise DataError("no such file")

    with pytest.raises(DataError) as caught:
        compute_once(world, [1], compute, 1)
    return str(caught.value)


def test_all_ranks_raise_what_the_computing_rank_raises():
    assert run_ranks(2, compute_what_fails) == ["rank 0: no such file"] * 2

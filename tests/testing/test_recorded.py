"""Recorded ranks: what is noted, which values arrive, and that nothing stays behind in this process."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ConfigError
from engine.parallel.agreement import broadcast_ints, first_problem, gather_ints, sum_ints
from engine.parallel.collectives import all_gather, all_max, all_reduce, reduce_scatter
from engine.parallel.layout import Layout, World, build_process_groups, init_distributed
from engine.testing.communication import Compute, HostSync, Launch, NewGroup, Wait
from engine.testing.distributed import run_ranks, world_of
from engine.testing.recorded import Recorded, record_ranks, record_training
from engine.testing.runs import run_config
from engine.testing.turns import LeftAloneError, Lockstep


def record(body: Callable[[World], Any], layout: Layout, **options: Any) -> list[Recorded[Any]]:
    """Record `body(world)` on the ranks of a layout."""

    def program() -> Any:
        return body(build_process_groups(init_distributed("cpu"), layout))

    return record_ranks(layout.world_size, program, **options)


def problems_of(body: Callable[[dist.ProcessGroup, Tensor], Any], device: str = "cpu") -> tuple[str, ...]:
    """What is found on rank 0 of two when `body` uses the dp group and a tensor of 8 elements."""

    def run(world: World) -> None:
        assert world.dp_group is not None
        body(world.dp_group, torch.ones(8, device=world.device))

    return record(run, Layout(dp=2), device=device)[0].record.problems


def test_groups_operations_waits_and_operators_are_noted_in_order() -> None:
    def body(world: World) -> None:
        x = torch.ones(4)
        assert world.tp_group is not None
        work = all_max(x[1:], world.tp_group)
        _ = (torch.ones(2) + 1).view(1, 2)[0]  # two operators; views and allocations are none
        work.wait()

    for rank in record(body, Layout(tp=2, dp=2)):
        *start, launch, computed, wait = rank.record.events
        groups = [event.group for event in start if isinstance(event, NewGroup)]
        assert [group.axis for group in groups] == ["world", "control", "dp", "tp"]
        peers = (0, 1) if rank.record.rank < 2 else (2, 3)
        assert isinstance(launch, Launch) and launch.group == groups[-1] and launch.group.ranks == peers
        assert (launch.kind, launch.detail, launch.shape, launch.dtype) == ("all_reduce", "max", (3,), "float32")
        assert (launch.nbytes, launch.peer, launch.message) == (12, None, None)
        assert computed == Compute(2)
        assert wait == Wait(launch.number, "outside of the engine")


def test_messages_are_named_by_the_action_that_needs_them_on_both_sides(tmp_path: Path) -> None:
    settings = ("--parallel.pp=2", "--parallel.schedule=interleaved", "--parallel.virtual_stages=2", "--batch.global=2")
    records = record_training(run_config(tmp_path, *settings), Layout(pp=2), steps=1)
    launches = [[e for e in record.events if isinstance(e, Launch) and e.message] for record in records]
    sent, received = ([e.message for e in launches[0] if e.kind == kind] for kind in ("send", "recv"))
    forwards = {"F0", "F1", "F0.1", "F1.1"}
    assert {*sent} == forwards | {"B0", "B1"}  # B0 needs the gradient of chunk 1 on stage 0
    assert {*received} == {"F0.1", "F1.1", "B0", "B1", "B0.1", "B1.1"}
    assert all("executor.py" in launch.caller for launch in launches[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_touched_while_it_is_under_way_is_a_problem(device: str) -> None:
    def read_too_early(group: dist.ProcessGroup, x: Tensor) -> None:
        work = all_gather(x, x[:4].clone(), group)
        _ = x[5:] * 2
        work.wait()

    def write_too_early(group: dist.ProcessGroup, x: Tensor) -> None:
        work = reduce_scatter(x[:4].clone(), x, group)
        x.view(2, 4)[1].zero_()
        work.wait()

    def launch_too_early(group: dist.ProcessGroup, x: Tensor) -> None:
        work = all_reduce(x, group)
        dist.all_reduce(x[:1])
        work.wait()

    (found,) = problems_of(read_too_early, device)
    assert "aten.mul" in found and "reads memory that all_gather on dp" in found and "still writes" in found
    (found,) = problems_of(write_too_early, device)
    assert "aten.zero_" in found and "writes memory that reduce_scatter on dp" in found and "still reads" in found
    assert any("all_reduce on world" in found and "still writes" in found for found in problems_of(launch_too_early))


def test_memory_beside_what_is_under_way_may_be_touched() -> None:
    def body(group: dist.ProcessGroup, x: Tensor) -> None:
        work = all_reduce(x[:4], group)
        x[4:] += 1
        all_reduce(x[:4], group).wait()  # in order with the one before
        work.wait()
        x += 1
        sending = reduce_scatter(x[:4].clone(), x, group)
        _ = x + 1
        sending.wait()

    assert problems_of(body) == ()


def test_the_host_waits_for_the_meta_device_and_not_for_itself() -> None:
    def body(world: World) -> tuple[float, list[float]]:
        x = torch.zeros(2, device=world.device)
        x.copy_(torch.ones(2), non_blocking=True)
        x += torch.ones(2).to(world.device)
        return x.sum().item(), x.tolist()

    on_meta, on_cpu = record(body, Layout(dp=2), device="meta")[0], record(body, Layout(dp=2))[0]
    assert on_meta.result == (1.0, [1.0, 1.0]) and on_cpu.result == (4.0, [2.0, 2.0])
    assert sum(isinstance(event, HostSync) for event in on_meta.record.events) == 3
    assert not any(isinstance(event, HostSync) for event in on_cpu.record.events)


def test_collectives_make_up_what_would_arrive() -> None:
    def body(world: World) -> list[Tensor]:
        assert world.dp_group is not None
        x = torch.arange(2.0) + world.rank
        gathered, scattered, total = torch.zeros(4), torch.zeros(1), x.clone()
        for work in (all_gather(gathered, x, world.dp_group), reduce_scatter(scattered, x, world.dp_group)):
            work.wait()
        dist.all_reduce(total)
        return [gathered, scattered, total]

    gathered, scattered, total = record(body, Layout(dp=2))[1].result
    assert gathered.tolist() == [1, 2, 1, 2] and scattered.tolist() == [2] and total.tolist() == [1, 2]


def decide(world: World) -> tuple[list[int], list[int], list[int], str | None]:
    """Numbers that all ranks agree on."""
    problem = f"rank {world.rank} is tired" if world.rank >= 1 else None
    return (
        sum_ints(world, [world.rank, 1]),
        gather_ints(world, 10 + world.rank),
        broadcast_ints(world, [7, 8] if world.is_main else []),
        first_problem(world, problem),
    )


def decide_in_world() -> tuple[list[int], list[int], list[int], str | None]:
    return decide(world_of())


def test_in_lockstep_all_ranks_decide_as_real_ones_do() -> None:
    recorded = [rank.result for rank in record(decide, Layout(dp=3), turns=Lockstep())]
    assert recorded == run_ranks(3, decide_in_world)
    assert recorded == [([3, 3], [10, 11, 12], [7, 8], "rank 1 is tired")] * 3


def test_one_after_another_all_ranks_decide_as_if_they_were_equal() -> None:
    recorded = [rank.result for rank in record(decide, Layout(dp=3))]
    assert recorded == [([0, 3], [10, 10, 10], [7, 8], None)] * 3


def test_in_lockstep_a_rank_that_leaves_ends_those_that_wait_for_it() -> None:
    def leave(world: World) -> None:
        if world.rank == 0:
            sum_ints(world, [1])

    def fail(world: World) -> None:
        if world.rank == 1:
            raise ConfigError("no more")
        sum_ints(world, [1])

    with pytest.raises(LeftAloneError, match="rank 0 is in all_reduce, and other ranks are not"):
        record(leave, Layout(dp=2), turns=Lockstep())
    with pytest.raises(ConfigError, match="no more"):
        record(fail, Layout(dp=2), turns=Lockstep())


def test_in_lockstep_ranks_that_want_different_things_end() -> None:
    def body(world: World) -> None:
        sum_ints(world, [1]) if world.rank else broadcast_ints(world, [1])

    with pytest.raises(LeftAloneError):
        record(body, Layout(dp=2), turns=Lockstep())


@pytest.mark.parametrize("turns", [None, Lockstep()], ids=["one after another", "lockstep"])
def test_nothing_stays_behind(turns: Lockstep | None) -> None:
    new_group, environment, threads = dist.new_group, dict(os.environ), threading.active_count()

    def fail(world: World) -> None:
        raise ConfigError(f"rank {world.rank}")

    with pytest.raises(ConfigError, match="rank 0"):
        record(fail, Layout(pp=2, dp=2), turns=turns)
    assert not dist.is_initialized() and dist.new_group is new_group
    assert dict(os.environ) == environment and threading.active_count() == threads
    names = [[e.group.name for e in r.record.events if isinstance(e, NewGroup)] for r in record(decide, Layout(dp=2))]
    assert names[0] == names[1] and names[0][:2] == ["0", "1"]


def test_only_the_ranks_that_are_asked_for_run() -> None:
    assert [rank.result for rank in record(lambda world: world.rank, Layout(dp=1024), ranks=[0, 1023])] == [0, 1023]


def test_recording_leaves_the_hook_for_tracebacks_as_it_was():
    """PyTorch puts one in front of it, with the rank, whenever a process group starts."""
    before = sys.excepthook
    record_ranks(2, lambda: init_distributed("cpu").rank)
    assert sys.excepthook is before

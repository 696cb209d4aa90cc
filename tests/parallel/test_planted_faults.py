"""Faults planted into the engine: each is found in the records of a small layout, by exactly the checks named here.

A fault is a patch of a few lines, of the kind that a change could bring in by mistake. Taking out the checks that are
named makes it pass unseen, so every check is needed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.optim.optimizer import ShardedAdamW
from engine.parallel import collectives, tensor
from engine.parallel.agreement import sum_ints
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout, World
from engine.parallel.pipeline import executor
from engine.parallel.pipeline.executor import Pipeline
from engine.parallel.pipeline.program import Program, Step, StepKind, build_program
from engine.parallel.pipeline.schedules import build_schedule
from engine.testing import recorded
from engine.testing.communication import CHECKS, problems
from engine.testing.proof import failures
from engine.testing.recorded import record_training
from engine.testing.runs import run_config
from engine.testing.simulator import MODES, find_hang, unsafe_stops
from engine.train.step import DistributedModel

Patch = pytest.MonkeyPatch
HANGS = set(MODES)
DP, TP, PP, PP3 = Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(pp=3)


@dataclass(frozen=True)
class Fault:
    """A fault, where it shows, and the checks and modes of the simulator that find it."""

    plant: Callable[[Patch], None]
    layout: Layout
    found_by: set[str]
    settings: tuple[str, ...] = ()


def is_rank(rank: int) -> bool:
    return int(os.environ["RANK"]) == rank


def around(patch: Patch, where: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *arguments)`."""
    original = getattr(where, name)
    patch.setattr(where, name, lambda *arguments, **options: change(original, *arguments, **options))


# Collectives.


def collective_skipped_on_one_rank(patch: Patch) -> None:
    around(patch, World, "sum_on_device", lambda original, world, x: None if is_rank(1) else original(world, x))


def two_collectives_swapped_on_one_rank(patch: Patch) -> None:
    def update(original: Any, self: ShardedAdamW, *arguments: Any) -> Any:
        if is_rank(1):
            self.shards.reverse()
        return original(self, *arguments)

    around(patch, ShardedAdamW, "update", update)


def wrong_size_on_one_rank(patch: Patch) -> None:
    around(patch, World, "sum_on_device", lambda original, world, x: original(world, x.repeat(2) if is_rank(1) else x))


def wrong_reduction_on_one_rank(patch: Patch) -> None:
    around(
        patch, World, "sum_on_device",
        lambda original, world, x: dist.all_reduce(x, dist.ReduceOp.MAX) if is_rank(1) else original(world, x),
    )  # fmt: skip


def scatter_skipped_on_one_rank(patch: Patch) -> None:
    def scatter(original: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        return x.chunk(2)[1] if is_rank(1) else original(x, group)

    around(patch, tensor, "scatter_sequence_sum", scatter)


def one_rank_asks_the_others(patch: Patch) -> None:
    def update(original: Any, self: ShardedAdamW, *arguments: Any) -> Any:
        if is_rank(0):
            sum_ints(self.parameters.world, [1])
        return original(self, *arguments)

    around(patch, ShardedAdamW, "update", update)


# Waits.


def no_wait_for_gathered_input(patch: Patch) -> None:
    def gathered(x: torch.Tensor, group: Any) -> torch.Tensor:
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        collectives.all_gather(out, x.contiguous(), group)
        return out

    for module in (collectives, tensor):
        patch.setattr(module, "gathered", gathered)


def no_wait_for_parameters(patch: Patch) -> None:
    patch.setattr(ShardedParameters, "wait_for_params_before_forward", lambda self, module: None)


def optimizer_does_not_wait_for_gradients(patch: Patch) -> None:
    def reduce(original: Any, self: ShardedParameters) -> None:
        late = []
        for bucket in self.buckets:
            if bucket.reducing is None:
                self._start_reducing(bucket)
            late.append(bucket.reducing)
            bucket.reducing = None
        self.late = late  # type: ignore[attr-defined]

    def norm(original: Any, self: ShardedParameters) -> torch.Tensor:
        result = original(self)
        for work in self.late:  # type: ignore[attr-defined]
            work.wait()
        return result

    around(patch, ShardedParameters, "reduce_gradients", reduce)
    around(patch, ShardedParameters, "gradient_norm", norm)


def buckets_reduced_one_microbatch_early(patch: Patch) -> None:
    def start(original: Any, self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.last_of = {key: replace(action, microbatch=2) for key, action in self.last_of.items()}

    around(patch, executor._Run, "__init__", start)


def parameters_waited_for_twice(patch: Patch) -> None:
    def wait_for(original: Any, self: ShardedParameters, buckets: Any) -> None:
        gathering = [(bucket, bucket.gathering) for bucket in buckets]
        original(self, buckets)
        for bucket, work in gathering:
            if work is not None:
                bucket.twice = work
            elif getattr(bucket, "twice", None) is not None:
                bucket.twice.wait()
                bucket.twice = None

    around(patch, ShardedParameters, "_wait_for", wait_for)


def send_never_waited_for(patch: Patch) -> None:
    def execute(original: Any, self: Any) -> torch.Tensor:
        class Forgetful(list):
            def __iter__(self) -> Any:
                return iter(self[:-1])

        do = {StepKind.RECEIVE: self._post_receive, StepKind.COMPUTE: self._compute, StepKind.SEND: self._send}
        for step in self.steps:
            do[step.kind](step.action)
        self.steps, self.sends = (), Forgetful(self.sends)
        return original(self)

    around(patch, executor._Run, "execute", execute)


def message_overwritten_while_it_is_sent(patch: Patch) -> None:
    def send(original: Any, self: Any, action: Any) -> None:
        message = self.results[action]
        original(self, action)
        message.zero_()

    around(patch, executor._Run, "_send", send)


def messages_received_into_one_tensor(patch: Patch) -> None:
    def boundary(original: Any, self: DistributedModel) -> torch.Tensor:
        if not hasattr(self, "only"):
            self.only = original(self)  # type: ignore[attr-defined]
        return self.only.data  # type: ignore[attr-defined]  # autograd does not see that it is written again

    around(patch, DistributedModel, "_new_boundary", boundary)


# Programs of stages.


def rewrite(patch: Patch, change: Callable[[Program], list[list[Step]]]) -> None:
    """Change the steps of all stages, after the program has been proven."""

    def run(original: Any, self: Any, program: Program, *arguments: Any) -> torch.Tensor:
        return original(self, replace(program, steps=tuple(map(tuple, change(program)))), *arguments)

    around(patch, Pipeline, "run", run)


def posted(steps: tuple[Step, ...], ahead: int) -> list[Step]:
    """A stage that posts the receives of this action and of `ahead` more before it computes, whatever they need."""
    receives = [step for step in steps if step.kind is StepKind.RECEIVE]
    order = [step.action for step in steps if step.kind is StepKind.COMPUTE]
    receives.sort(key=lambda step: order.index(step.action))
    needing = [step.action for step in receives]
    found: list[Step] = []
    taken = 0
    for step in steps:
        if step.kind is StepKind.COMPUTE:
            taken += step.action in needing
            found += [receive for receive in receives[: taken + ahead] if receive not in found]
        if step.kind is not StepKind.RECEIVE:
            found.append(step)
    return found


def receives_two_ahead(patch: Patch) -> None:
    rewrite(patch, lambda program: [posted(steps, 2) for steps in program.steps])


def receives_two_ahead_on_one_channel(patch: Patch) -> None:
    receives_two_ahead(patch)
    patch.setattr(executor._Run, "_channel", lambda self, *_: self.pipeline.world.channels["forward"])


def receives_before_the_send_on_both_sides(patch: Patch) -> None:
    """Safe if one host stops for its device, and not if two do."""

    def before_send(steps: tuple[Step, ...]) -> list[Step]:
        found = list(steps)
        for i in range(1, len(found)):
            if found[i].kind is StepKind.RECEIVE and found[i - 1].kind is StepKind.SEND:
                found[i - 1], found[i] = found[i], found[i - 1]
        return found

    rewrite(patch, lambda program: [before_send(steps) for steps in program.steps])


def blocking_sends_without_receives_ahead(patch: Patch) -> None:
    def send(original: Any, self: Any, action: Any) -> None:
        original(self, action)
        while self.sends:
            self.sends.pop(0)[1].wait()

    rewrite(patch, lambda program: [posted(steps, 0) for steps in program.steps])
    around(patch, executor._Run, "_send", send)


def two_sends_swapped(patch: Patch) -> None:
    def swapped(program: Program) -> list[list[Step]]:
        stages = [list(steps) for steps in program.steps]
        sends = [i for i, step in enumerate(stages[0]) if step.kind is StepKind.SEND][:2]
        first = stages[0].pop(sends[0])
        stages[0].insert(sends[1], first)
        return stages

    rewrite(patch, swapped)


def another_order_on_one_stage(patch: Patch) -> None:
    def other(program: Program) -> list[list[Step]]:
        stages = [list(steps) for steps in program.steps]
        if program.schedule.trains:
            gpipe = build_program(build_schedule("gpipe", len(stages), program.schedule.num_microbatches))
            stages[1] = list(gpipe.steps[1])
        return stages

    rewrite(patch, other)


# Groups.


def group(ranks: list[int], axis: str) -> None:
    if int(os.environ["RANK"]) in ranks:
        dist.new_group(ranks, group_desc=axis, use_local_synchronization=True)


def ends_made_first(patch: Patch) -> None:
    def build(original: Any, world: World, layout: Layout, **options: Any) -> World:
        group([0, layout.pp - 1], "tied_embedding")
        return original(world, layout, **options)

    around(patch, recorded, "build_process_groups", build)


def groups_in_another_order_on_one_rank(patch: Patch) -> None:
    def build(original: Any, world: World, layout: Layout, **options: Any) -> World:
        for axis in ("dp", "kv") if is_rank(0) else ("kv", "dp"):
            group([0, 1], axis)
        return original(world, layout, **options)

    around(patch, recorded, "build_process_groups", build)


BUCKETS = ("--batch.global", "8")
FAULTS = [
    Fault(collective_skipped_on_one_rank, DP, {"order"} | HANGS),
    Fault(two_collectives_swapped_on_one_rank, DP, {"order"}),
    Fault(wrong_size_on_one_rank, DP, {"order"}),
    Fault(wrong_reduction_on_one_rank, DP, {"order"}),
    Fault(scatter_skipped_on_one_rank, TP, {"order"} | HANGS),
    Fault(one_rank_asks_the_others, DP, {"order"} | HANGS),
    Fault(no_wait_for_gathered_input, TP, {"waits", "memory"}),
    Fault(no_wait_for_parameters, DP, {"memory"}),
    Fault(optimizer_does_not_wait_for_gradients, DP, {"memory"}),
    Fault(buckets_reduced_one_microbatch_early, DP, {"memory"}, BUCKETS),
    Fault(parameters_waited_for_twice, DP, {"waits"}),
    Fault(send_never_waited_for, PP, {"waits"}),
    Fault(message_overwritten_while_it_is_sent, PP, {"memory"}),
    Fault(messages_received_into_one_tensor, PP, {"memory"}),
    Fault(receives_two_ahead, PP, {"one queue", "synchronous"}),
    Fault(receives_two_ahead_on_one_channel, PP, HANGS),
    Fault(receives_before_the_send_on_both_sides, PP, {"synchronous"}),
    Fault(blocking_sends_without_receives_ahead, PP, HANGS),
    Fault(two_sends_swapped, PP, {"pairs"}),
    Fault(another_order_on_one_stage, PP, HANGS),
    Fault(ends_made_first, PP3, {"groups", "pairs"} | HANGS),
    Fault(groups_in_another_order_on_one_rank, DP, {"groups"} | HANGS),
]


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Record the ranks of a layout whose parameters are in several buckets."""
    monkeypatch.setitem(ShardedParameters.__init__.__kwdefaults__, "bucket_size", 50_000)

    def run(fault: Fault):
        config = run_config(tmp_path, "--parallel.pp", str(fault.layout.pp), *fault.settings)
        return record_training(config, fault.layout)

    return run


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_found_by_these_checks_and_no_other(fault, record, monkeypatch):
    fault.plant(monkeypatch)
    records = record(fault)
    found = {name: problems(records, checks=[name]) for name in CHECKS}
    found |= {mode: [text] for mode in MODES if (text := find_hang(records, mode))}
    assert {name for name, texts in found.items() if texts} == fault.found_by
    assert all("rank " in text for texts in found.values() for text in texts)
    assert failures(records)
    without = [name for name in CHECKS if name not in fault.found_by]
    assert failures(records, checks=without, modes=[mode for mode in MODES if mode not in fault.found_by]) == []


@pytest.mark.parametrize("fault", {(f.layout, f.settings): f for f in FAULTS}.values(), ids=lambda f: str(f.layout))
def test_nothing_is_found_where_nothing_is_planted(fault, record):
    assert failures(record(fault)) == []


def stops(tmp_path, ranks_at_once: int) -> int:
    """How many stops of hosts would hang a step of 1F1B on two stages."""
    records = record_training(run_config(tmp_path, "--parallel.pp", "2"), PP, steps=1)
    return len(unsafe_stops(records, at_once=ranks_at_once))


def test_no_stop_of_one_host_or_of_two_hangs(tmp_path):
    assert stops(tmp_path, 1) == stops(tmp_path, 2) == 0


def test_a_rule_for_one_host_is_not_enough(tmp_path, monkeypatch):
    """Why the simulator has the mode "synchronous": each stop alone is safe, and two at once are not."""
    receives_before_the_send_on_both_sides(monkeypatch)
    assert stops(tmp_path, 1) == 0
    assert stops(tmp_path, 2) > 0


def test_receives_two_ahead_hang_at_a_stop_of_one_host(tmp_path, monkeypatch):
    receives_two_ahead(monkeypatch)
    assert stops(tmp_path, 1) > 10


def test_no_check_is_idle():
    assert set().union(*(fault.found_by for fault in FAULTS)) == {*CHECKS, *MODES}
    assert len(FAULTS) >= 20

"""Gradients summed over the data-parallel ranks in bf16: half the bytes, and no roundings but those that were meant."""

from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.config.schema import ParallelConfig as Parallel
from engine.model.parameters import parameter_table
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import tiny_config
from engine.testing.parity import Case, Outcome, Problem, deviation, measure
from engine.testing.runs import losses, run_config, run_training, write_dataset
from tests.parallel.late import late
from tests.parallel.live_memory import LiveMemory, settled

MODEL = tiny_config("tiny-qwen2", num_layers=2)
BF16, FP32 = torch.bfloat16, torch.float32
Summed = tuple[list[Tensor], list[Tensor], dict[str, int], int]


def summed(layout: Layout, dtype: torch.dtype, sharded: bool) -> Summed:
    """Random gradients of each bucket, what this rank's shards hold after the sum, bytes given to each collective, and
    the elements of a gradient that all tensor-parallel ranks have."""
    world = world_of(layout)
    table = parameter_table(MODEL, tp=world.tp)
    parameters = ShardedParameters(table, FP32, world, sharded=sharded, reduce_dtype=dtype, bucket_size=50_000)
    parameters.begin_step()
    random = torch.Generator().manual_seed(world.rank)
    for sink in parameters.sinks.values():
        sink.add(torch.randn(sink.main_grad.shape, generator=random))
    given = [bucket.grad.clone() for bucket in parameters.buckets]
    with late() as traffic:
        for path in parameters.by_path:
            parameters.flow.completed(path)
        assert all(bucket.reducing is not None for bucket in parameters.buckets)  # while the backward pass goes on
        parameters.reduce_gradients()
    if layout.tp == 1:  # all start before the first wait
        assert [event.split()[0] for event in traffic.events] == ["start"] * len(given) + ["wait"] * len(given)
    sent = {name: traffic.total_bytes(name) for name in ("reduce_scatter", "all_reduce")}
    replicated = sum(part.stop - part.start for b in parameters.buckets for part in b.plan.ranges("tp"))
    return given, [bucket.grad_shard.clone() for bucket in parameters.buckets], sent, replicated


def sums_in(ranks: list[Summed], rank: int, bucket: int, dtype: torch.dtype) -> Tensor:
    """The whole sum of a bucket's gradients as `rank` adds them: from itself downwards, each time in `dtype`."""
    order = [ranks[(rank - shift) % len(ranks)] for shift in range(len(ranks))]
    return reduce(torch.add, [given[bucket].to(dtype) for given, *_ in order]).float()


@pytest.mark.parametrize("sharded", [True, False])
def test_two_ranks_add_rounded_gradients_and_round_the_sum(sharded):
    ranks = run_ranks(2, summed, Layout(dp=2), BF16, sharded)
    assert len(ranks[0][0]) > 3
    for rank, (_, sums, *_) in enumerate(ranks):
        for number, found in enumerate(sums):
            expected = sums_in(ranks, rank, number, BF16)
            assert torch.equal(found, expected.chunk(2)[rank] if sharded else expected)
            assert not torch.equal(expected, sums_in(ranks, rank, number, FP32))


def test_four_ranks_round_after_each_addition():
    ranks = run_ranks(4, summed, Layout(dp=4), BF16, True)
    for rank, (_, sums, *_) in enumerate(ranks):
        for number, found in enumerate(sums):
            assert torch.equal(found, sums_in(ranks, rank, number, BF16).chunk(4)[rank])


@pytest.mark.parametrize(("sharded", "collective"), [(True, "reduce_scatter"), (False, "all_reduce")])
def test_half_the_bytes_are_sent(sharded, collective):
    wide, narrow = (run_ranks(2, summed, Layout(dp=2), dtype, sharded)[0][2] for dtype in (FP32, BF16))
    assert wide[collective] == 2 * narrow[collective] > 0


def test_sums_over_ranks_with_the_same_parameters_stay_fp32():
    """Norms and biases of output projections: fp32 over tensor-parallel ranks, then bf16 over data-parallel ones."""
    layout = Layout(dp=2, tp=2)
    wide, narrow = (run_ranks(4, summed, layout, dtype, True)[0] for dtype in (FP32, BF16))
    assert narrow[2]["all_reduce"] == wide[2]["all_reduce"] == 4 * narrow[3] > 0
    alone = run_ranks(2, summed, Layout(tp=2), BF16, True), run_ranks(2, summed, Layout(tp=2), FP32, True)
    for in_bf16, in_fp32 in zip(*alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(in_bf16[1], in_fp32[1], strict=True))


def live_bytes(sharded: bool) -> tuple[int, int, int]:
    """Bytes that are held beside the buckets while all are under way, their peak until the end, and the elements of
    the largest bucket."""
    world = world_of()
    parameters = ShardedParameters(
        parameter_table(MODEL), FP32, world, sharded=sharded, reduce_dtype=BF16, bucket_size=5000
    )
    parameters.begin_step()
    with LiveMemory() as memory:
        for path in parameters.by_path:
            parameters.flow.completed(path)
        held = settled(memory)
        parameters.reduce_gradients()
    return held, memory.peak, max(bucket.plan.size for bucket in parameters.buckets)


def test_buckets_under_way_need_no_memory_of_their_own():
    """Only a copy of the largest one for a moment. Sharded, gloo also holds what the other rank has sent."""
    for held, peak, largest in run_ranks(2, live_bytes, False):
        assert held == 0
        assert peak == 4 * largest  # its sum in fp32
    for held, _, _ in run_ranks(2, live_bytes, True):
        size = parameter_table(MODEL).local_size
        assert held == pytest.approx(2 * size / 2, rel=0.05)


LAYOUTS = {
    "dp 2": (2, {}),
    "dp 4": (4, {}),
    "tp 2, dp 2": (2, {"tp": 2}),
    "dp 2, not sharded": (2, {"sharded_optimizer": False}),
}
LIMITS = {"fp32": (2e-4, 3e-3, 4e-3), "bf16": (3e-3, 2e-2, 2e-2)}  # loss, gradient norm, parameters


def assert_within(outcome: Outcome, reference: Outcome, precision: str, name: str) -> None:
    found = deviation(outcome, reference)
    print(f"| {name} | {precision} | {found.loss:.1e} | {found.grad_norm:.1e} | {found.parameters:.1e} |")
    assert not outcome.torn
    for value, limit in zip((found.loss, found.grad_norm, found.parameters), LIMITS[precision], strict=True):
        assert 0 < value < limit


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_deviates_by_the_rounding_alone(tmp_path, precision):
    """`pytest -s` prints the rows of docs/measurements.md."""
    problem = Problem("tiny", {"batch.global": 8, "precision.mode": precision})
    layouts = LAYOUTS if precision == "fp32" else {"dp 2": LAYOUTS["dp 2"]}
    cases = [
        Case(Parallel(grad_reduce_dtype=dtype, **settings), dp)
        for dp, settings in layouts.values()
        for dtype in ("fp32", "bf16")
    ]
    outcomes = measure(tmp_path, problem, cases)
    for name, (wide, narrow) in zip(layouts, list(pairwise(outcomes))[::2], strict=True):
        assert_within(narrow, wide, precision, name)


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, sharded):
    write_dataset(tmp_path / "corpus")
    settings = ("--parallel.grad_reduce_dtype", "bf16", "--parallel.sharded_optimizer", sharded)
    constant = ("--lr_schedule.kind", "constant")

    def run(name: str, steps: int) -> list[float]:
        directory = ("--run.dir", str(tmp_path / name))
        return losses(run_training(run_config(tmp_path, *settings, *constant, *directory, steps=steps), 2))

    whole = run("whole", 8)
    run("cut", 3)
    assert run("cut", 8) == whole

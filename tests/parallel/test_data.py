from collections import defaultdict
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from engine.config.schema import ModelConfig, OptimizerConfig
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import kv_replicas, parameter_table
from engine.optim.optimizer import ShardedAdamW
from engine.parallel import data
from engine.parallel.buckets import plan_buckets
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout, World
from engine.parallel.pipeline.partition import partition
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import logical_state, new_parameters, tiny_config
from tests.parallel.late import late

MODEL = tiny_config("tiny-qwen2", num_layers=2)  # has biases: decaying and other parameters in a bucket


IN_FP8 = {p.path for p in parameter_table(MODEL).parameters if p.layer is not None and len(p.shape) == 2}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket_size", [1000, 50_000, 1 << 25])
@pytest.mark.parametrize("in_fp8", [set(), IN_FP8], ids=["", "in fp8"])
def test_every_parameter_has_one_place_and_decaying_ones_come_first(ranks, bucket_size, in_fp8):
    table = parameter_table(MODEL)
    plans = plan_buckets(table, ranks, bucket_size, in_fp8)
    paths = [slot.parameter.path for plan in plans for slot in plan.slots]
    assert sorted(paths) == sorted(parameter.path for parameter in table.parameters)
    for plan in plans:
        end = 0
        for slot in plan.slots:
            assert slot.offset >= end
            assert slot.offset % 128 == 0
            assert (slot.end <= plan.decay_end) if slot.parameter.weight_decay else (slot.offset >= plan.decay_end)
            end = slot.end
        assert plan.size >= end
        assert plan.size % (ranks * 128) == 0
        assert {slot.parameter.path in in_fp8 for slot in plan.slots} == {plan.in_fp8}
    in_forward = [parameter.path for parameter in table.parameters]
    completed = [min(in_forward.index(slot.parameter.path) for slot in plan.slots) for plan in plans]
    assert completed == sorted(completed, reverse=True)  # the order in which the backward pass finishes them
    if bucket_size == 1000 or not in_fp8:
        assert "head.weight" in {slot.parameter.path for slot in plans[0].slots}


def train(
    bucket_size: int, dtype: torch.dtype, sharded: bool = True, steps: int = 3
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A few updates on this rank's share of 8 fixed sequences, with collectives that are late."""
    with late():
        return train_on_time(bucket_size, dtype, sharded, steps)


def train_on_time(
    bucket_size: int, dtype: torch.dtype, sharded: bool, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    world = world_of()
    parameters = ShardedParameters(parameter_table(MODEL), dtype, world, sharded=sharded, bucket_size=bucket_size)
    parameters.initialize(1)
    model = Decoder(MODEL, Parameters(parameters.by_path, parameters.sinks))
    for unit in model.units():
        parameters.wait_for_params_before_forward(unit)
    optimizer = ShardedAdamW(parameters, OptimizerConfig(lr=1e-2, clip_grad=0.5, weight_decay=0.3))
    share = 8 // world.layout.dp
    tokens = torch.randint(0, 257, (8, 17), generator=torch.Generator().manual_seed(0))
    mine = tokens[world.rank * share : (world.rank + 1) * share]
    norms = []
    for step in range(1, steps + 1):
        parameters.begin_step()
        for number, row in enumerate(mine, 1):
            parameters.flow.is_last_pass = number == len(mine)
            _loss(model, row, 1 / 128).backward()
        norm, skipped = optimizer.update(step, 1e-2)
        assert skipped.item() == 0
        norms.append(norm.item())
    _loss(model, mine[0])  # the layers wait for the parameters of the last update
    return norms, {name: value.clone() for name, value in logical_state(MODEL, parameters.by_path).items()}


def _loss(model: Decoder, row: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return model.loss(row[:-1], torch.arange(16), row[1:], torch.ones(16), (0, 16), scale=scale)


def plain_training() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same with torch's own clipping and optimizer."""
    named = new_parameters(MODEL)
    model = Decoder(MODEL, Parameters(named))
    groups = [
        {"params": [p for p in named.values() if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    tokens = torch.randint(0, 257, (8, 17), generator=torch.Generator().manual_seed(0))
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        for row in tokens:
            _loss(model, row, 1 / 128).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 0.5).item())
        optimizer.step()
    return norms, logical_state(MODEL, named)


@pytest.mark.parametrize(
    ("ranks", "bucket_size", "sharded"),
    [(1, 1 << 25, True), (1, 5000, True), (2, 5000, True), (2, 5000, False), (4, 1 << 25, True)],
)
def test_sharded_training_equals_torch(ranks, bucket_size, sharded):
    expected_norms, expected = plain_training()
    results = run_ranks(ranks, train, bucket_size, torch.float32, sharded)
    for norms, state in results:
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert all(torch.equal(value, results[0][1][name]) for name, value in state.items())
        for name, value in expected.items():
            # A key bias has no gradient but rounding noise (softmax ignores it), which Adam blows up.
            tolerance = 1e-3 if name.endswith("k_proj.bias") else 1e-4
            assert (state[name] - value).norm() / value.norm().clamp(min=1e-3) < tolerance, name


def test_bf16_keeps_fp32_masters():
    one, two = run_ranks(2, train, 5000, torch.bfloat16)
    assert one[0] == two[0]
    for name, value in one[1].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, two[1][name]), name
    parameters = ShardedParameters(parameter_table(MODEL), torch.bfloat16, world_of())
    parameters.initialize(1)
    optimizer = ShardedAdamW(parameters, OptimizerConfig())
    shard = optimizer.shards[0]
    shard.bucket.grad.fill_(1.0)
    before = shard.param.clone()
    optimizer.update(1, 1e-6)  # far below bf16's resolution at most weights
    assert shard.param.dtype == torch.float32
    assert not torch.equal(shard.param, before)


def skip() -> tuple[float, bool]:
    world = world_of()
    parameters = ShardedParameters(parameter_table(MODEL), torch.float32, world)
    parameters.initialize(1)
    optimizer = ShardedAdamW(parameters, OptimizerConfig())
    before = [tensor.clone() for shard in optimizer.shards for tensor in shard.kinds.values()]
    for bucket in parameters.buckets:
        bucket.grad.fill_(0.1)
    if world.rank == 1:
        parameters.buckets[0].grad[5] = float("nan")
    _, skipped = optimizer.update(1, 1e-2)
    after = [tensor for shard in optimizer.shards for tensor in shard.kinds.values()]
    return skipped.item(), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_nan_on_one_rank_skips_the_step_on_all():
    assert run_ranks(2, skip) == [(1.0, True), (1.0, True)]


def test_gradients_below_the_limit_are_not_scaled():
    def updated(limit: float) -> list[torch.Tensor]:
        parameters = ShardedParameters(parameter_table(MODEL), torch.float32, world_of())
        parameters.initialize(1)
        optimizer = ShardedAdamW(parameters, OptimizerConfig(clip_grad=limit))
        parameters.buckets[0].grad.fill_(1e-4)
        optimizer.update(1, 1e-3)
        return [shard.exp_avg.clone() for shard in optimizer.shards]

    assert all(torch.equal(a, b) for a, b in zip(updated(1e6), updated(0.0), strict=True))


def begin(bucket_size: int) -> tuple[ShardedParameters, Decoder]:
    parameters = ShardedParameters(parameter_table(MODEL), torch.float32, world_of(), bucket_size=bucket_size)
    parameters.initialize(1)
    decoder = Decoder(MODEL, Parameters(parameters.by_path, parameters.sinks))
    for unit in decoder.units():
        parameters.wait_for_params_before_forward(unit)
    parameters.begin_step()
    return parameters, decoder


def reduce_while_going_backward() -> None:
    parameters, model = begin(5000)
    incomplete: list[int] = []  # parameters whose gradients were still to come when a reduction started
    started = data.reduce_scatter

    def reduce_scatter(out: Tensor, x: Tensor, group) -> data.Work:
        incomplete.append(sum(len(bucket.incomplete) for bucket in parameters.buckets))
        return started(out, x, group)

    row = torch.arange(17)
    with patch.object(data, "reduce_scatter", reduce_scatter):
        _loss(model, row).backward()
        assert not incomplete
        assert all(bucket.reducing is None for bucket in parameters.buckets)
        parameters.flow.is_last_pass = True
        _loss(model, row).backward()
        assert len(incomplete) == len(parameters.buckets) > 5
        assert incomplete[0] > len(parameters.by_path) / 2  # the head's, when nearly all are to come
        assert incomplete == sorted(incomplete, reverse=True)
        assert incomplete[-1] == 0
        under_way = [bucket.reducing for bucket in parameters.buckets]
        assert None not in under_way
        parameters.reduce_gradients()
        assert len(incomplete) == len(parameters.buckets)  # nothing is reduced twice
        assert all(bucket.reducing is None for bucket in parameters.buckets)


def test_reductions_start_during_the_last_backward_and_not_before():
    run_ranks(2, reduce_while_going_backward)


def gather_while_going_forward() -> None:
    parameters, model = begin(5000)
    optimizer = ShardedAdamW(parameters, OptimizerConfig())
    optimizer.update(1, 1e-3)
    assert count(parameters) == len(parameters.buckets) > 5
    pending: list[int] = []
    for unit in model.units():
        unit.register_forward_pre_hook(lambda *_: pending.append(count(parameters)))
    with torch.no_grad():
        _loss(model, torch.arange(17))
    assert pending == sorted(pending, reverse=True)
    assert pending[0] >= len(parameters.buckets) - 2  # the embedding has waited for its own
    assert pending[-1] == 0
    optimizer.broadcast_params()
    assert count(parameters) == len(parameters.buckets)
    parameters.finish_gathering()
    assert count(parameters) == 0


def count(parameters: ShardedParameters) -> int:
    return sum(bucket.gathering is not None for bucket in parameters.buckets)


def test_parameters_are_gathered_while_the_next_forward_goes_on():
    run_ranks(2, gather_while_going_forward)


def publish_twice() -> None:
    parameters, _ = begin(5000)
    optimizer = ShardedAdamW(parameters, OptimizerConfig())
    with late():
        optimizer.broadcast_params()
        optimizer.broadcast_params()
        parameters.finish_gathering()
    for path, value in new_parameters(MODEL).items():
        assert torch.equal(parameters.by_path[path], value)


def test_a_gathering_ends_before_the_next_one_begins():
    run_ranks(2, publish_twice)


Summed = tuple[list[tuple[tuple, Tensor, Tensor]], float]


def sum_replicas(preset: str, layout: Layout) -> tuple[Summed, Summed]:
    """Sharded and unsharded: see `sums`."""
    model = tiny_config(preset, num_layers=2)
    world = world_of(layout, kv_replicas=kv_replicas(model, layout.tp))
    return sums(model, world, sharded=True), sums(model, world, sharded=False)


def sums(model: ModelConfig, world: World, *, sharded: bool) -> Summed:
    """For each logical tensor random gradients and the sums of them that this rank has in the end, NaN outside of its
    shards; and the norm."""
    layout = world.layout
    parts = partition(2, layout.pp, head_cost=0.0)[world.coords.pp :: layout.pp]
    table = parameter_table(model, parts, world.tp)
    parameters = ShardedParameters(table, torch.float32, world, sharded=sharded, bucket_size=5000)
    random = torch.Generator().manual_seed(world.rank)
    parameters.begin_step()
    for sink in parameters.sinks.values():
        sink.add(torch.randn(sink.main_grad.shape, generator=random))
    before = [bucket.grad.clone() for bucket in parameters.buckets]
    with late():
        for path in parameters.by_path:
            parameters.flow.completed(path)
        for bucket in parameters.buckets:  # what both ends of a pipeline share waits for the other end
            assert (bucket.reducing is None) == bool(bucket.plan.ranges("tied_embedding"))
        parameters.reduce_gradients()
        norm = parameters.gradient_norm().item()
    found = []
    for bucket, given in zip(parameters.buckets, before, strict=True):
        after = torch.full_like(bucket.grad, torch.nan)
        after[bucket.begin : bucket.end] = bucket.grad_shard
        for slot in bucket.plan.slots:
            for tensor, offset in slot.tensors():
                part = slice(offset, offset + tensor.rectangle.size)
                found.append(((tensor.name, *tensor.rectangle.start), given[part], after[part]))
    return found, norm


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("tiny-qwen2", Layout(tp=4)),  # pairs of ranks share key and value heads and their biases
        ("tiny-qwen3", Layout(dp=2, tp=2)),
        ("tiny-starcoder2", Layout(pp=2, dp=2)),  # embedding and head are one tensor
        ("tiny-starcoder2", Layout(pp=2, tp=2)),
    ],
    ids=str,
)
def test_gradients_are_summed_over_all_ranks_that_hold_them_and_counted_once(preset, layout):
    for results in zip(*run_ranks(layout.world_size, sum_replicas, preset, layout), strict=True):
        expected: dict[tuple, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        for found, _ in results:
            for key, given, _ in found:
                expected[key] = expected[key] + given
        seen = {key: torch.zeros(len(total), dtype=torch.bool) for key, total in expected.items()}
        for found, _ in results:
            for key, _, total in found:
                seen[key] |= ~total.isnan()
                assert not ((total - expected[key]).abs() > 1e-5).any(), key
        assert all(everywhere.all() for everywhere in seen.values())
        norm = torch.cat(list(expected.values())).norm().item()
        assert [found for _, found in results] == pytest.approx([norm] * layout.world_size, rel=1e-6)

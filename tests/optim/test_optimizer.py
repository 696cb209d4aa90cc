from pathlib import Path

import pytest
import torch

from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import OptimizerConfig
from engine.model.parameters import parameter_table
from engine.ops import adamw as module
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.data import ShardedParameters
from engine.testing.distributed import world_of
from engine.testing.models import tiny_config
from engine.testing.runs import losses, read_records, run_config
from engine.train.run import train

MODEL = tiny_config(num_layers=1)


def descend(moments: str, steps: int = 40) -> ShardedAdamW:
    """Minimize |weights − 1|² / 2, with noise in the gradients."""
    parameters = ShardedParameters(parameter_table(MODEL), torch.float32, world_of(), bucket_size=30_000)
    parameters.initialize(1)
    optimizer = ShardedAdamW(parameters, OptimizerConfig(moments=moments, weight_decay=0.0, clip_grad=0.0))
    noise = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for bucket in parameters.buckets:
            bucket.grad.copy_(bucket.param - 1).add_(torch.randn(bucket.grad.shape, generator=noise), alpha=0.3)
        optimizer.update(step, 0.02)
    return optimizer


def test_bf16_moments_descend_as_fp32_ones_do_in_half_the_memory():
    start, wide, narrow = descend("fp32", 0), descend("fp32"), descend("bf16")
    for before, a, b in zip(start.shards, wide.shards, narrow.shards, strict=True):
        assert a.param.dtype == b.param.dtype == torch.float32
        assert (a.param - b.param).norm() < 0.01 * (a.param - before.param).norm()
        for kind in ("exp_avg", "exp_avg_sq"):
            assert b.kinds[kind].dtype == torch.bfloat16
            assert 2 * b.kinds[kind].nbytes == a.kinds[kind].nbytes
            # each step rounds once, to 8 bits; over many steps the errors stay of that size
            assert (a.kinds[kind] - b.kinds[kind]).norm() < 0.01 * a.kinds[kind].norm()


def test_bf16_moments_are_widened_piece_by_piece(monkeypatch):
    whole = descend("bf16", 3)
    monkeypatch.setattr(module, "_PIECE", 1000)
    for a, b in zip(whole.shards, descend("bf16", 3).shards, strict=True):
        assert all(torch.equal(a.kinds[kind], b.kinds[kind]) for kind in a.kinds)


def test_a_skipped_step_leaves_bf16_moments_alone():
    optimizer = descend("bf16", 2)
    before = [tensor.clone() for shard in optimizer.shards for tensor in shard.kinds.values()]
    optimizer.parameters.buckets[0].grad[3] = torch.inf
    _, skipped = optimizer.update(3, 0.02)
    assert skipped == 1
    after = [tensor for shard in optimizer.shards for tensor in shard.kinds.values()]
    assert all(map(torch.equal, before, after))


def run_with(directory: Path, moments: str, steps: int) -> list[float]:
    """Losses of the run in `directory`, which is begun or continued."""
    flat = ("--lr_schedule.kind", "constant", "--model.num_layers", "2")
    config = run_config(
        directory.parent, "--run.dir", str(directory), "--optimizer.moments", moments, *flat, steps=steps
    )
    train(config)
    return losses(read_records(directory / "metrics.jsonl"))


def test_bf16_moments_survive_a_checkpoint(workspace):
    expected = run_with(workspace / "whole", "bf16", 6)
    run_with(workspace / "cut", "bf16", 3)
    checkpoint = open_checkpoint(workspace / "cut")
    stored = checkpoint.read("model.norm.weight", kind="exp_avg")
    assert stored.any()
    assert torch.equal(stored, stored.bfloat16().float())
    assert run_with(workspace / "cut", "bf16", 6) == expected
    assert run_with(workspace / "wide", "fp32", 6) == pytest.approx(expected, rel=1e-3)
    assert run_with(workspace / "wide", "bf16", 8)[:6] == pytest.approx(expected, rel=1e-3)  # one reads the other's

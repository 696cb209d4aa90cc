"""What parallelism promises to save, counted on real tensors of real models."""

from pathlib import Path

import pytest
import torch

from engine.config.schema import Config
from engine.model.attention import attend_within
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import parameter_table
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import random_batches, run_config
from engine.train.step import build_model
from tests.parallel.live_memory import LiveCalls, LiveMemory, settled


def config_of(*overrides: str, preset: str = "tiny") -> Config:
    return run_config(Path("."), "--batch.global", "8", *overrides, preset=preset)


KINDS = [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16")]


def optimizer_bytes(layout: Layout) -> dict[bool, list[int]]:
    """Of all distinct tensors that the optimizer holds and the model does not; sharded or not, for each kind of model
    and moments."""
    world, found = world_of(layout), {True: [], False: []}
    for sharded, sizes in found.items():
        for dtype, moments in KINDS:
            config = config_of("--optimizer.moments", moments, "--parallel.sharded_optimizer", str(sharded))
            _, optimizer = build_model(config, world, dtype, seed=None)
            storages = [tensor.untyped_storage() for shard in optimizer.shards for tensor in shard.kinds.values()]
            weights = {bucket.param.untyped_storage().data_ptr() for bucket in optimizer.parameters.buckets}
            distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
            sizes.append(sum(size for pointer, size in distinct.items() if pointer not in weights))
    return found


@pytest.mark.parametrize("dp", [2, 4])
def test_the_optimizer_is_divided_among_the_data_parallel_ranks(dp):
    whole = optimizer_bytes(Layout())[True]
    for found in run_ranks(dp, optimizer_bytes, Layout(dp=dp)):
        assert found[True] == pytest.approx([size / dp for size in whole], rel=0.01)
        assert found[False] == pytest.approx(whole, rel=0.01)


def between_blocks(config: Config, layout: Layout) -> tuple[set[torch.Size], int]:
    """Shapes of the hidden states that blocks are given and give, and the bytes that a forward pass keeps."""
    world = world_of(layout)
    parameters = ShardedParameters(parameter_table(config.model, tp=world.tp), torch.float32, world)
    decoder = Decoder(
        config.model, Parameters(parameters.by_path, parameters.sinks), tp=world.tp, parallel=config.parallel
    )
    shapes: set[torch.Size] = set()
    for block in decoder.layers:
        block.register_forward_hook(
            lambda _, arguments, out: shapes.update((arguments[0].shape, *(x.shape for x in out)))
        )
    tokens = torch.arange(config.data.seq_length)
    with LiveMemory() as memory:
        hidden = decoder(tokens, tokens, attend_within((0, len(tokens)), config.model))
        kept = settled(memory)
    return shapes | {hidden.shape}, kept


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_activations_between_blocks_are_divided_among_the_tensor_parallel_ranks(tp):
    """Under full recompute these are all that is kept, beside the rotary tables and the rows of the embedding."""
    config = config_of("--parallel.recompute", "full")
    tokens, model = config.data.seq_length, config.model
    tables = (tokens * model.head_dim + model.head_dim // 2) * 4  # and their frequencies
    rows = tokens * 9 if tp > 1 else 0  # an integer and a mask
    for shapes, kept in run_ranks(tp, between_blocks, config, Layout(tp=tp)):
        assert shapes == {(tokens // tp, model.hidden_size)}
        assert kept - tables - rows == (model.num_layers + 1) * tokens // tp * model.hidden_size * 4


SCHEDULES = {"gpipe": [8, 8], "1f1b": [2, 1], "zero_bubble": [2, 2]}


def in_flight() -> list[int]:
    """With each schedule, of how many of eight microbatches activations are alive at once."""
    world, most = world_of(Layout(pp=2)), []
    for schedule in SCHEDULES:
        config = config_of("--parallel.schedule", schedule)
        model, optimizer = build_model(config, world, torch.float32, seed=1)
        batches = random_batches(config)
        live = LiveCalls(
            [bucket.param for bucket in optimizer.parameters.buckets]
            + [tensor for b in batches for tensor in (b.tokens, b.labels, b.loss_mask, b.positions)]
        )
        model.pipeline.parts = [live.follow(part) for part in model.pipeline.parts]
        model.train(batches, 1.0)
        assert len(live.calls) == 8
        assert live.alive() == 0
        most.append(live.most)
    return most


def test_no_more_microbatches_are_alive_than_the_schedule_says():
    """With 1F1B two of the eight microbatches on the first of two stages."""
    assert list(zip(*run_ranks(2, in_flight), strict=True)) == [tuple(counts) for counts in SCHEDULES.values()]

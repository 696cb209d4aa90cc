"""What follows from a configuration and a layout, for people."""

from collections.abc import Iterator

import torch

from engine.config import Config, microbatches
from engine.model.parameters import parameter_table
from engine.parallel.layout import Coordinates, Layout
from engine.parallel.pipeline.check import bubble_fraction, simulate
from engine.parallel.pipeline.schedules import build
from engine.plan.memory import estimate
from engine.plan.stages import stage_parts, stage_table
from engine.plan.throughput import FLOPS_FORMULA, flops_per_token


def describe(config: Config, layout: Layout, reason: str, dtype: torch.dtype, device_type: str) -> Iterator[str]:
    """Model, layout, batch, steps, and who holds what; a line each."""
    batch, count, table = config.batch, microbatches(config, layout.dp), parameter_table(config.model)
    per_step = batch.global_ * config.data.seq_length
    flops = flops_per_token(config, table)
    yield f"model       {table.num_parameters:,} parameters, {flops / 1e9:.4g} GFLOP per token"
    yield f"flops       {FLOPS_FORMULA}"
    yield (
        f"layout      {layout.world_size} rank(s) = {layout.tp} tensor- × {layout.pp} pipeline- × {layout.dp} "
        f"data-parallel; {reason}"
    )
    yield (
        f"batch       {batch.global_} sequences = {layout.dp} data-parallel rank(s) × {count} microbatch(es) × "
        f"{batch.micro}; {per_step:,} tokens per step"
    )
    yield f"run         {config.train.steps:,} steps = {config.train.steps * per_step:,} tokens"
    if layout.pp > 1:
        schedule = build(config.parallel.schedule, layout.pp, count, config.parallel.virtual_stages)
        yield f"pipeline    {schedule.name}; its bubble adds {bubble_fraction(simulate(schedule)):.1%} to the time of a step"
    for stage in range(layout.pp):
        yield _stage(config, layout, stage, dtype, device_type)


def _stage(config: Config, layout: Layout, stage: int, dtype: torch.dtype, device_type: str) -> str:
    first, last = (
        layout.rank_at(Coordinates(stage, 0, 0, 0)),
        layout.rank_at(Coordinates(stage, layout.dp - 1, 0, layout.tp - 1)),
    )
    ranks = f"rank {first}" if first == last else f"ranks {first}–{last}"
    parts = stage_parts(config, layout, stage)
    held = ["embedding"] * parts[0].embeds
    held += [
        f"layers {p.layers[0]}–{p.layers[-1]}" if len(p.layers) > 1 else f"layer {p.layers[0]}"
        for p in parts
        if p.layers
    ]
    held += ["head"] * parts[-1].predicts
    size = stage_table(config, layout, first).local_size
    memory = estimate(config, layout, stage, dtype, device_type)
    return f"stage {stage:<5} {ranks}: {', '.join(held)}; {size:,} parameters and {memory}"

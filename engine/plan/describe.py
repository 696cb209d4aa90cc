"""Summary of a run: model, layout, batch, steps, and the pipeline stages with their memory."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from textwrap import wrap

import torch

from engine.config.derived import microbatches
from engine.config.schema import Config
from engine.formatting import counted, duration
from engine.model.parameters import parameter_table
from engine.parallel.layout import Coordinates, Layout, TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.plan.memory import estimate, unit_of
from engine.plan.stages import stage_parts
from engine.plan.throughput import FLOPS_FORMULA, bubble, flops_per_token, step_seconds

LONG_SILENCE_S = 120.0  # between two lines of the log; more is worth a warning
_LABEL = 12  # width of the first column


def describe_run(config: Config, layout: Layout, reason: str, dtype: torch.dtype, device_type: str) -> Iterator[str]:
    """Yield lines on model, layout, batch and steps, and a table of the pipeline stages: contents and memory of each.

    Args:
        reason: reason for this layout, from `choose_layout`.
        dtype: dtype of the weights.
    """
    batch, count, table = config.batch, microbatches(config.batch, layout.dp), parameter_table(config.model)
    per_step = batch.global_ * config.data.seq_length
    flops = flops_per_token(config.model, table, config.data.seq_length)
    yield f"model       {table.num_parameters:,} parameters, {flops / 1e9:.4g} GFLOP per token"
    yield f"flops       {FLOPS_FORMULA}"
    yield f"layout      {counted(layout.world_size, 'rank')} = {_grid(layout)}"
    yield from (f"{'':{_LABEL}}{line}" for line in wrap(reason, 120 - _LABEL))
    cut = f"dp {layout.dp} × {counted(count, 'microbatch', 'es')} of {batch.micro}"
    yield f"batch       {batch.global_} sequences = {cut}; {per_step:,} tokens per step"
    steps, epochs = config.train.steps, config.train.epochs
    yield f"run         {f'{steps:,} steps = {steps * per_step:,} tokens' if steps else counted(epochs, 'epoch')}"
    if layout.pp > 1:
        parallel = config.parallel
        chunks = f", {parallel.virtual_stages} chunks per stage" if parallel.virtual_stages > 1 else ""
        added = f"its bubble adds {bubble(parallel, layout.pp, count):.1%} to the time of a step"
        yield f"pipeline    {parallel.schedule}{chunks}; {added}"
    if device_type == "cuda":
        yield from _silence(config, layout)
    yield from _stages(config, layout, dtype, device_type)


def _silence(config: Config, layout: Layout) -> Iterator[str]:
    """Yield a warning if the first report of a step is minutes away, by the time of a step on one kind of GPU."""
    interval = min(config.log.interval, config.train.steps or config.log.interval)
    if (seconds := interval * step_seconds(config, layout)) > LONG_SILENCE_S:
        yield (
            f"warning     the first step in the log is step {interval}, about {duration(seconds)} after the start on "
            f"H200s and later on slower GPUs; to see one sooner, lower log.interval = {config.log.interval}"
        )


def _grid(layout: Layout) -> str:
    """Format the sizes of the axes, and the rank order if several axes are larger than 1."""
    cut = [axis for axis, size in (("tp", layout.tp), ("dp", layout.dp), ("pp", layout.pp)) if size > 1]
    order = f"; neighbors differ in {', then in '.join(cut)}" if len(cut) > 1 else ""
    return f"tp {layout.tp} × pp {layout.pp} × dp {layout.dp}{order}"


def _stages(config: Config, layout: Layout, dtype: torch.dtype, device_type: str) -> Iterator[str]:
    estimates = [estimate(config, layout, stage, dtype, device_type) for stage in range(layout.pp)]
    unit, name = unit_of(max(needed.total for needed in estimates))
    kinds = list(asdict(estimates[0]))[1:]
    rows = [["per rank", "ranks", "layers", "parameters", "weights", *kinds, f"total {name}"]]
    for stage, needed in enumerate(estimates):
        first = layout.rank_at(Coordinates(stage, 0, 0, 0))
        last = layout.rank_at(Coordinates(stage, layout.dp - 1, 0, layout.tp - 1))
        parts = stage_parts(config.model, config.parallel, config.data.seq_length, layout.pp, stage)
        table = parameter_table(config.model, parts, TensorParallel(0, layout.tp))
        sizes = (*asdict(needed).values(), needed.total)
        rows.append(
            [
                f"stage {stage}",
                f"{first}" if first == last else f"{first}–{last}",
                _holds(parts),
                f"{table.local_size:,}",
                *(f"{size / unit:.1f}" for size in sizes),
            ]
        )
    yield from _table(rows)


def _holds(parts: Sequence[Part]) -> str:
    """Format the contents of a stage, as in `embedding, 0–3, 16–19`."""
    layers = [part.layers for part in parts if part.layers]
    ranges = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in layers]
    return ", ".join([*["embedding"] * parts[0].has_embedding, *ranges, *["head"] * parts[-1].has_head])


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align the columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, ranks, layers, *numbers in rows:
        words = f"{label:{_LABEL}}{ranks:{widths[1]}}  {layers:{widths[2]}}"
        yield "  ".join([words, *(cell.rjust(width) for cell, width in zip(numbers, widths[3:], strict=True))])

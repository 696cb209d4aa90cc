"""Numbers that follow from several settings."""

import math

from engine.config.schema import BatchConfig, Config
from engine.errors import ConfigError


def with_steps(config: Config, rows: int | None = None) -> Config:
    """`config` with the steps of the run and of its warm-up as numbers.

    Args:
        rows: sequences of an epoch, in fine-tuning.

    Raises:
        ConfigError: the warm-up and the decay take longer than the run.
    """
    train, schedule = config.train, config.lr_schedule
    steps = train.steps
    if rows is not None and train.epochs:
        needed = math.ceil(train.epochs * rows / config.batch.global_)
        steps = min(steps, needed) if steps else needed
    warmup = schedule.warmup_steps or math.ceil(schedule.warmup_ratio * steps)
    behind = warmup + (schedule.decay_steps or 0)
    if behind > steps:
        raise ConfigError(
            f"lr_schedule.warmup_steps + decay_steps = {behind} is more than the {steps} steps of the run"
        )
    return config.model_copy(
        update={
            "train": train.model_copy(update={"steps": steps}),
            "lr_schedule": schedule.model_copy(update={"warmup_steps": warmup}),
        }
    )


def microbatches(batch: BatchConfig, dp: int) -> int:
    """Forward passes per rank and optimizer step, for `dp` data-parallel ranks.

    Raises:
        ConfigError: the global batch cannot be cut so.
    """
    micro, total = batch.micro, batch.global_
    if total % (micro * dp):
        step = micro * dp
        near = sorted({max(step, total // step * step), (total // step + 1) * step})
        raise ConfigError(
            f"batch.global = {total} is not a multiple of batch.micro × data-parallel ranks = {micro} × {dp} = {step}; "
            f"{'the nearest that work are' if len(near) > 1 else 'the nearest that works is'} "
            f"batch.global = {' or '.join(map(str, near))}"
        )
    return total // (micro * dp)

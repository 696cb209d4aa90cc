"""Values computed from several settings."""

import math

from engine.config.schema import BatchConfig, Config
from engine.errors import ConfigError


def with_steps(config: Config, rows: int | None = None) -> Config:
    """Return `config` with `train.steps` and `lr_schedule.warmup_steps` computed from epochs and ratios.

    Args:
        rows: sequences per epoch in fine-tuning; None if the data have no epochs.

    Raises:
        ConfigError: warmup and decay are longer than the run.
    """
    train, schedule = config.train, config.lr_schedule
    steps = train.steps
    if rows is not None and train.epochs:
        needed = math.ceil(train.epochs * rows / config.batch.global_)
        steps = min(steps, needed) if steps else needed
    warmup = schedule.warmup_steps or math.ceil(schedule.warmup_ratio * steps)
    warmup_and_decay = warmup + (schedule.decay_steps or 0)
    if warmup_and_decay > steps:
        raise ConfigError(
            f"lr_schedule.warmup_steps + decay_steps = {warmup_and_decay} is more than the {steps} steps of the run"
        )
    return config.model_copy(
        update={
            "train": train.model_copy(update={"steps": steps}),
            "lr_schedule": schedule.model_copy(update={"warmup_steps": warmup}),
        }
    )


def microbatches(batch: BatchConfig, dp: int) -> int:
    """Return the microbatches per rank and optimizer step, for `dp` data-parallel ranks.

    Raises:
        ConfigError: the global batch is not divisible by batch.micro × dp; names the nearest sizes that are.
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

"""Learning-rate schedules: pure functions of the step."""

import math

from engine.config.schema import LrScheduleConfig


def learning_rate(step: int, peak: float, schedule: LrScheduleConfig, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 1 to `total_steps`).

    Warmup rises linearly and reaches `peak` at step `warmup_steps`. Then `constant` stays at `peak`; `linear` and
    `cosine` decay to `min_lr` at the last step; `wsd` stays and decays linearly to `min_lr` over the last `decay_steps`
    (default: a tenth of all steps; Hu et al. 2024, arXiv 2404.06395).
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = total_steps - schedule.warmup_steps
    if schedule.kind == "wsd":
        decay_steps = min(schedule.decay_steps or max(1, total_steps // 10), decay_steps)
    remaining = min(1.0, max(0.0, (total_steps - step) / decay_steps)) if decay_steps else 1.0
    share = 0.5 * (1 - math.cos(math.pi * remaining)) if schedule.kind == "cosine" else remaining
    return schedule.min_lr + (peak - schedule.min_lr) * share

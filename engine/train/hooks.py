"""Training hooks: callbacks that run every n steps around the training loop.

Reports, evaluation, checkpoints and early stopping are hooks, each defined in its own file; `_hooks` in `run.py` lists
them as `(every, hook)`. To add a profiler, write a class like this, and add `(1, Profiler()),` to that list:

    class Profiler(Hook):
        def before_training(self, trainer):
            self.profile = torch.profiler.profile()
            self.profile.start()

        def after_step(self, trainer, result):
            self.profile.step()

        def after_training(self, trainer):
            self.profile.stop()

An experiment tracker (Weights & Biases, MLflow) needs the logged metrics, not every step: implement `Tracker` in
`log.py`.
"""

from collections.abc import Sequence

from engine.train.signals import StopRequest
from engine.train.step import StepResult
from engine.train.trainer import Trainer


class Hook:
    """Base class for training callbacks, called on every rank.

    A hook may use collectives, and any decision must be identical on all ranks. Run slow work inside
    `trainer.clock.paused()`, which excludes it from throughput.

    Attributes:
        phase: what the hook does, to report a failure.
    """

    phase = "running a hook"

    def before_training(self, trainer: Trainer) -> None:
        """Called once, before the first step; `trainer.progress` is where the run starts or resumes."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Called after each step that is due; `trainer.progress` includes it. Reading `result` waits for the device."""

    def after_training(self, trainer: Trainer) -> None:
        """Called once, after the last step, early stopping or a stop signal; not after an error."""


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether a hook is called after `step`: at multiples of `every` and at the last step; if 0, only at the last."""
    return step == last_step or (every > 0 and step % every == 0)


def train_with_hooks(trainer: Trainer, hooks: Sequence[tuple[int, Hook]], stop: StopRequest) -> None:
    """Train to the last step, or until a hook or a signal ends the run.

    Args:
        hooks: (every, hook), called in this order; see `is_due`.
    """
    for _, hook in hooks:
        trainer.phase = f"before step {trainer.progress.step + 1}, {hook.phase}"
        hook.before_training(trainer)
    for result in trainer.steps(stop):
        for every, hook in hooks:
            if is_due(result.step, every, trainer.config.train.steps):
                trainer.phase = f"step {result.step}, {hook.phase}"
                hook.after_step(trainer, result)
    for _, hook in hooks:
        trainer.phase = f"after step {trainer.progress.step}, {hook.phase}"
        hook.after_training(trainer)

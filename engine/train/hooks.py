"""Hooks: the work of every n steps, beside the steps themselves.

A run is a list of `(every, hook)` around the loop below. Reports, evaluation, saving and early stopping are hooks, each
in the file of its subject; `_hooks` in `run.py` lists them. To add a profiler, write a class like this, and the line
`(1, Profiler()),` there:

    class Profiler(Hook):
        def before_training(self, trainer):
            self.profile = torch.profiler.profile()
            self.profile.start()

        def after_step(self, trainer, result):
            self.profile.step()

        def after_training(self, trainer):
            self.profile.stop()

A tracker of experiments (Weights & Biases, MLflow) wants the reported numbers, not the steps: it is a `Tracker`, in
`log.py`.
"""

from collections.abc import Sequence

from engine.train.signals import StopRequest
from engine.train.step import StepResult
from engine.train.trainer import Trainer


class Hook:
    """Work beside the steps, called on all ranks: it may use collectives, and what it decides must be the same on all.

    What takes long happens inside `trainer.clock.paused()`, which leaves it out of the reported speed.
    """

    def before_training(self, trainer: Trainer) -> None:
        """Once, before the first step; `trainer.progress` is where the run starts or resumes."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After a step that is due; `trainer.progress` counts it. Reading `result` waits for the device."""

    def after_training(self, trainer: Trainer) -> None:
        """Once, after the last step, an early end or a stop signal; not after an error."""


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether a hook is called: at multiples of `every` and at the last step; with 0, at the last step alone."""
    return step == last_step or (every > 0 and step % every == 0)


def train_with_hooks(trainer: Trainer, hooks: Sequence[tuple[int, Hook]], stop: StopRequest) -> None:
    """Train to the end, or until a hook or a signal ends it.

    Args:
        hooks: (every, hook) in the order in which they are called; see `is_due`.
    """
    for _, hook in hooks:
        hook.before_training(trainer)
    for result in trainer.steps(stop):
        for every, hook in hooks:
            if is_due(result.step, every, trainer.config.train.steps):
                hook.after_step(trainer, result)
    for _, hook in hooks:
        hook.after_training(trainer)

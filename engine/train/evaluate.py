"""Evaluation on held-out data (the same samples every time, in any layout), the best evaluation, early stopping."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from engine.checkpoint.manifest import Best
from engine.config.schema import Config
from engine.data.samples.dataset import SampleDataset
from engine.errors import DataError
from engine.formatting import duration
from engine.parallel.agreement import on_all_ranks, sum_ints
from engine.parallel.layout import World
from engine.train.hooks import Hook
from engine.train.log import RunLog
from engine.train.saving import Saving
from engine.train.step import DistributedModel, StepResult
from engine.train.trainer import Trainer, global_batches


class Evaluation(Hook):
    """Evaluate, including before step 1 of a fresh run, and track the best evaluation. A no-op if `data` is None."""

    phase = "evaluating"

    def __init__(self, data: SampleDataset | None, log: RunLog) -> None:
        self.data, self.log = data, log

    def before_training(self, trainer: Trainer) -> None:
        if trainer.progress.step == 0:
            self._evaluate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        if self.data is None:
            return
        step = trainer.progress.step
        with trainer.clock.paused():
            started = time.perf_counter()
            phase = trainer.phase

            def report(batch: int, batches: int) -> None:
                trainer.phase = f"{phase}, batch {batch} of {batches}"

            loss = evaluate(trainer.model, self.data, trainer.config, trainer.world, report)
            note_evaluation(trainer, loss)
            perplexity = math.exp(min(loss, 700.0))
            took = duration(time.perf_counter() - started)
            self.log.say(f"evaluation at step {step} | loss {loss:.4f} | perplexity {perplexity:.2f} | took {took}")
            self.log.metrics("eval", {"step": step, "time": time.time(), "eval_loss": loss, "eval_ppl": perplexity})


class EarlyStopping(Hook):
    """Save and end the run after `train.early_stopping` consecutive evaluations without a new best."""

    phase = "comparing evaluations"

    def __init__(self, saving: Saving, log: RunLog) -> None:
        self.saving, self.log = saving, log

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if stops_early(trainer):
            self.saving.save(trainer)
            patience = trainer.config.train.early_stopping
            self.log.say(f"early stopping: {patience} evaluations in a row without a new best")
            trainer.end()


def compares_evaluations(config: Config) -> bool:
    """Whether a setting depends on the best evaluation."""
    return config.checkpoint.keep_best or config.train.early_stopping > 0


def note_evaluation(trainer: Trainer, loss: float) -> bool:
    """Update the best evaluation; return whether this one is better. NaN never is."""
    step, best = trainer.progress.step, trainer.best
    if not compares_evaluations(trainer.config):
        return False
    improved = loss < (math.inf if best is None else best.loss)
    if improved:
        trainer.best = Best(step, loss, 0)
    elif best is not None and best.step != step:
        trainer.best = replace(best, worse=best.worse + 1)
    return improved


def stops_early(trainer: Trainer) -> bool:
    """Whether the last `train.early_stopping` evaluations were no better than the best."""
    patience = trainer.config.train.early_stopping
    return trainer.best is not None and 0 < patience <= trainer.best.worse


@torch.no_grad()
def evaluate(
    model: DistributedModel,
    dataset: SampleDataset,
    config: Config,
    world: World,
    report: Callable[[int, int], None] = lambda batch, batches: None,
) -> float:
    """Compute the mean loss per target token, in nats, over `train.eval_steps` global batches, or one epoch if shorter.

    Args:
        report: called with the number of each batch, from 1, and how many there are.

    Raises:
        DataError: on all ranks, the batches have no target tokens.
    """
    steps = config.train.eval_steps
    if dataset.num_rows is not None:
        steps = min(steps, math.ceil(dataset.num_rows / config.batch.global_))
    total = torch.zeros(1, device=world.device, dtype=torch.float64)
    tokens = 0
    read = global_batches(dataset, config, world, first_sample=0, steps=steps, num_workers=0)
    for batch, microbatches in enumerate(read, start=1):
        report(batch, steps)
        total += model.evaluate(microbatches).double()
        tokens += sum(each.num_tokens for each in microbatches) if world.is_model_parallel_leader else 0
    world.sum_on_device(total)
    (all_tokens,) = sum_ints(world, [tokens])
    if all_tokens == 0:
        text = "the evaluated batches have no target tokens; check the masks of the validation data"
        raise on_all_ranks(world, DataError(text))
    return total.item() / all_tokens

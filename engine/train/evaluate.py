"""Loss on held-out data: the same samples every time, whatever the layout."""

import math
from dataclasses import replace

import torch

from engine.checkpoint.rectangles import Best
from engine.config.schema import Config
from engine.data.samples.loader import batches
from engine.data.samples.sft import SftDataset
from engine.errors import DataError
from engine.parallel.agreement import sum_ints
from engine.parallel.layout import World
from engine.train.inputs import Data
from engine.train.step import DistributedModel
from engine.train.trainer import Trainer


def compares_evaluations(config: Config) -> bool:
    return config.checkpoint.keep_best or config.train.early_stopping > 0


def note_evaluation(trainer: Trainer, loss: float) -> bool:
    """Compare with the best evaluation so far; whether this is better, which NaN is not."""
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
    patience = trainer.config.train.early_stopping
    return trainer.best is not None and 0 < patience <= trainer.best.worse


@torch.no_grad()
def evaluate(model: DistributedModel, dataset: Data, config: Config, world: World) -> float:
    """Mean loss per token, in nats, over the first `train.eval_steps` global batches; conversations at most once.

    Raises:
        DataError: none of the tokens is a target.
    """
    steps = config.train.eval_steps
    if isinstance(dataset, SftDataset):
        steps = min(steps, math.ceil(dataset.num_rows / config.batch.global_))
    total = torch.zeros(1, device=world.device, dtype=torch.float64)
    tokens = 0
    batches_of_steps = batches(
        dataset,
        first_sample=0,
        num_samples=steps * config.batch.global_,
        global_batch_size=config.batch.global_,
        micro_batch_size=config.batch.micro,
        dp_rank=world.coords.dp,
        dp_size=world.layout.dp,
        document_mask=config.data.document_mask,
        num_workers=0,
        pin_memory=False,
    )
    for microbatches in batches_of_steps:
        total += model.evaluate(microbatches).double()
        tokens += sum(batch.num_tokens for batch in microbatches) if world.is_model_parallel_leader else 0
    world.sum_on_device(total)
    (all_tokens,) = sum_ints(world, [tokens])
    if all_tokens == 0:
        raise DataError("none of the tokens to evaluate is a target; look at the masks of the validation data")
    return total.item() / all_tokens

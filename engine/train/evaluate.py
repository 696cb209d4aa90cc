"""Loss on held-out data: the same samples every time, whatever the layout."""

import torch

from engine.config import Config
from engine.data.loader import batches
from engine.data.pretrain import PretrainDataset
from engine.parallel.layout import World
from engine.train.step import DistributedModel


@torch.no_grad()
def evaluate(model: DistributedModel, dataset: PretrainDataset, config: Config, world: World) -> float:
    """Mean loss per token, in nats, over the first `train.eval_steps` global batches of `dataset`."""
    total = torch.zeros(1, device=world.device, dtype=torch.float64)
    tokens = 0
    steps = batches(
        dataset,
        first_sample=0,
        num_samples=config.train.eval_steps * config.batch.global_,
        global_batch_size=config.batch.global_,
        micro_batch_size=config.batch.micro,
        dp_rank=world.at.dp,
        dp_size=world.layout.dp,
        document_mask=config.data.document_mask,
        num_workers=0,
        pin_memory=False,
    )
    for microbatches in steps:
        total += model.evaluate(microbatches).double()
        tokens += sum(batch.num_tokens for batch in microbatches) if world.counts_batch else 0
    world.sum_on_device(total)
    (all_tokens,) = world.sum_on_host([tokens])
    return total.item() / all_tokens

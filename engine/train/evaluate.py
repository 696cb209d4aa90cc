"""Loss on held-out data: the same samples every time, whatever the layout."""

import torch
import torch.distributed as dist

from engine.config import Config
from engine.data.loader import batches
from engine.data.pretrain import PretrainDataset
from engine.model.decoder import Decoder
from engine.parallel.layout import World
from engine.train.step import batch_loss


@torch.no_grad()
def evaluate(model: Decoder, dataset: PretrainDataset, config: Config, world: World) -> float:
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
        for batch in microbatches:
            total += batch_loss(model, batch.to(world.device)).double()
            tokens += batch.num_tokens
    if world.dp_group is not None:
        dist.all_reduce(total, group=world.dp_group)
    (all_tokens,) = world.sum_on_host([tokens])
    return total.item() / all_tokens

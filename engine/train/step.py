"""One optimizer step: forward and backward over the microbatches, then the update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.data.loader import Batch
from engine.model.decoder import Decoder
from engine.optim.optimizer import ShardedAdamW


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. Tensors are fp32 [1] on the device; nothing here has waited for it.

    `loss` is this rank's part of the loss: the sum over its tokens divided by the tokens of the whole global batch, so
    that the sum over ranks is the mean over all tokens, however the batch is cut.
    """

    step: int
    lr: float
    tokens: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor


def train_step(
    model: Decoder,
    optimizer: ShardedAdamW,
    microbatches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    tokens: int,
) -> StepResult:
    """Train on one global batch, of which `microbatches` are this rank's share and `tokens` all unmasked tokens."""
    device = optimizer.parameters.buckets[0].param.device
    total = torch.zeros(1, device=device)
    optimizer.parameters.zero_grad()
    for batch in microbatches:
        loss = batch_loss(model, batch.to(device)) / tokens
        loss.backward()
        total += loss.detach()
    grad_norm, skipped = optimizer.update(step, lr)
    return StepResult(step, lr, tokens, total, grad_norm, skipped)


def batch_loss(model: Decoder, batch: Batch) -> torch.Tensor:
    """Summed loss of a batch of [b, s] tensors; an fp32 scalar."""
    return model.loss(
        batch.tokens.flatten(),
        batch.positions.flatten(),
        batch.labels.flatten(),
        batch.loss_mask.flatten(),
        batch.cu_seqlens,
    )

"""AdamW on this rank's shard of every bucket, with fp32 master weights.

Each bucket is updated by at most two calls on flat tensors, with and without weight decay. If the model is fp32, its
shard is the master. The decision to skip a step with non-finite gradients is made on the device from the reduced norm,
so all ranks skip together and the host does not wait.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.config.schema import OptimizerConfig
from engine.ops.adamw import adamw_step
from engine.parallel.buckets import Bucket
from engine.parallel.data import ShardedParameters


@dataclass(frozen=True)
class ShardState:
    """Optimizer state of a bucket: flat tensors of the shard's size. `param` is the fp32 master."""

    bucket: Bucket
    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @property
    def kinds(self) -> dict[str, torch.Tensor]:
        """The state tensors by their name in a checkpoint."""
        return {"param": self.param, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @property
    def rounded(self) -> torch.Tensor | None:
        """The shard of the model's parameters, in the model's dtype, or None if that is `param` itself."""
        shard = self.bucket.param_shard
        return None if shard.data_ptr() == self.param.data_ptr() else shard


@dataclass(frozen=True)
class Update:
    """Values common to all parameters in one step. Tensors are fp32 [1] on the device."""

    lr: float
    step: torch.Tensor
    scale: torch.Tensor
    skipped: torch.Tensor


class ShardedAdamW:
    """Decoupled weight decay Adam (Loshchilov and Hutter 2019) over `ShardedParameters`."""

    def __init__(self, parameters: ShardedParameters, config: OptimizerConfig) -> None:
        self.parameters = parameters
        self.config = config
        moments = torch.float32 if config.moments == "fp32" else torch.bfloat16
        self.shards = [_shard_state(bucket, moments) for bucket in parameters.buckets]

    @torch.no_grad()
    def update(self, step: int, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Finish the gradient reduction, clip, update, and start broadcasting the new parameters to all ranks.

        Args:
            step: number of this step, from 1.
            lr: learning rate of this step.

        Returns:
            The gradient norm before clipping, and 1 if the step was skipped because that norm is not finite, else 0;
            both fp32 [1] on the device.
        """
        self.parameters.reduce_gradients()
        norm = self.parameters.gradient_norm()
        skipped = (~torch.isfinite(norm)).float()
        limit = self.config.clip_grad
        scale = (norm / limit).clamp(min=1.0) if limit else torch.ones_like(norm)
        update = Update(lr, torch.full_like(norm, float(step)), scale, skipped)
        for shard in reversed(self.shards):  # the next forward pass needs the last bucket first
            for part, weight_decay in _decay_ranges(shard.bucket, self.config.weight_decay):
                self._apply(shard, part, weight_decay, update)
            self.parameters.gather(shard.bucket)
        self.parameters.gather_with_fp8()
        return norm, skipped

    @torch.no_grad()
    def broadcast_params(self) -> None:
        """Round the master weights into the model's dtype and start broadcasting them to all ranks."""
        for shard in reversed(self.shards):
            if shard.rounded is not None:
                shard.rounded.copy_(shard.param)
            self.parameters.gather(shard.bucket)
        self.parameters.gather_with_fp8()

    def _apply(self, shard: ShardState, part: slice, weight_decay: float, update: Update) -> None:
        adamw_step(
            shard.param[part],
            shard.bucket.grad_shard[part],
            shard.exp_avg[part],
            shard.exp_avg_sq[part],
            step=update.step,
            lr=update.lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=weight_decay,
            grad_scale=update.scale,
            found_inf=update.skipped,
            rounded=None if shard.rounded is None else shard.rounded[part],
        )


def _shard_state(bucket: Bucket, moments: torch.dtype) -> ShardState:
    shard = bucket.param_shard
    master = shard if shard.dtype == torch.float32 else shard.float()
    return ShardState(bucket, master, *(torch.zeros_like(master, dtype=moments) for _ in range(2)))


def _decay_ranges(bucket: Bucket, weight_decay: float) -> Iterator[tuple[slice, float]]:
    """Yield the non-empty slices of the shard with their weight decay."""
    boundary = min(max(bucket.plan.decay_end - bucket.begin, 0), bucket.end - bucket.begin)
    for first, last, decay in ((0, boundary, weight_decay), (boundary, bucket.end - bucket.begin, 0.0)):
        if first < last:
            yield slice(first, last), decay

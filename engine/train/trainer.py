"""The loop: global batches in, one result per optimizer step out.

The trainer only advances; whatever happens every n steps (reports, evaluation, checkpoints) belongs to whoever
iterates over `steps()`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.checkpoint.rectangles import Best
from engine.config.schema import Config
from engine.data.samples.loader import Batch, Samples, batches
from engine.errors import DataError
from engine.optim.optimizer import ShardedAdamW
from engine.optim.schedule import learning_rate
from engine.parallel.agreement import sum_ints
from engine.parallel.layout import World
from engine.train.signals import STOP_SIGNALS, StopRequest
from engine.train.step import DistributedModel, StepResult, train_step


@dataclass
class Progress:
    """How far a run is: steps done, samples and (unmasked) tokens consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


class Trainer:
    """Everything that one rank needs to train.

    Attributes:
        progress: advanced by each step; set it before `steps()` to resume.
        best: the best evaluation so far, where evaluations are compared.
        stopped_by: the signal for which all ranks have agreed to stop.
    """

    def __init__(
        self, config: Config, world: World, model: DistributedModel, optimizer: ShardedAdamW, data: Samples
    ) -> None:
        self.config = config
        self.world = world
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.progress = Progress()
        self.best: Best | None = None
        self.stopped_by: str | None = None

    def steps(self, stop: StopRequest) -> Iterator[StepResult]:
        """Train until `train.steps`, or until any rank's stop request."""
        for microbatches in self._batches():
            step = self.progress.step + 1
            signalled = [int(stop.signal == known) for known in STOP_SIGNALS]
            read = sum(batch.num_tokens for batch in microbatches) if self.world.is_model_parallel_leader else 0
            tokens, *signals = sum_ints(self.world, [read, *signalled])
            self.stopped_by = next(
                (known.name for known, count in zip(STOP_SIGNALS, signals, strict=True) if count), None
            )
            if self.stopped_by:
                return
            if tokens == 0:
                raise DataError(f"step {step}: none of its tokens is a target; look at the data's masks (inspect_data)")
            result = train_step(
                self.model, self.optimizer, microbatches, step=step, lr=self._learning_rate(step), tokens=tokens
            )
            samples = self.progress.samples + self.config.batch.global_
            self.progress = Progress(step, samples, self.progress.tokens + tokens)
            yield result

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, config.optimizer.lr, config.lr_schedule, config.train.steps)

    def _batches(self) -> Iterator[list[Batch]]:
        config, world = self.config, self.world
        return batches(
            self.data,
            first_sample=self.progress.samples,
            num_samples=(config.train.steps - self.progress.step) * config.batch.global_,
            global_batch_size=config.batch.global_,
            micro_batch_size=config.batch.micro,
            dp_rank=world.coords.dp,
            dp_size=world.layout.dp,
            document_mask=config.data.document_mask,
            num_workers=config.data.num_workers,
            pin_memory=world.device.type == "cuda",
        )

"""The training loop: yields one result per optimizer step. Periodic work is done by hooks (`hooks.py`)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.checkpoint.manifest import Best
from engine.config.schema import Config
from engine.data.samples.batch import Batch
from engine.data.samples.loader import Samples, batches
from engine.errors import DataError
from engine.optim.optimizer import ShardedAdamW
from engine.optim.schedule import learning_rate
from engine.parallel.agreement import on_all_ranks, sum_ints
from engine.parallel.layout import World
from engine.train.signals import STOP_SIGNALS, StopRequest
from engine.train.step import DistributedModel, StepResult, train_step

SETTING_UP = "setting up"


@dataclass
class Progress:
    """Progress of a run: optimizer steps, samples and target tokens consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


class Clock:
    """Seconds of training since the last restart, without pauses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body. Waits for the device first, so that queued steps are counted."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started


def global_batches(
    data: Samples, config: Config, world: World, *, first_sample: int, steps: int, num_workers: int
) -> Iterator[list[Batch]]:
    """Yield this rank's microbatches of each of `steps` global batches; in pinned memory if they go to a GPU."""
    return batches(
        data,
        first_sample=first_sample,
        num_samples=steps * config.batch.global_,
        global_batch_size=config.batch.global_,
        micro_batch_size=config.batch.micro,
        dp_rank=world.coords.dp,
        dp_size=world.layout.dp,
        document_mask=config.data.document_mask,
        num_workers=num_workers,
        pin_memory=world.device.type == "cuda",
    )


class Trainer:
    """Training state of one rank, and the loop over steps.

    Attributes:
        progress: advanced by each step; to resume, set it before `steps()`.
        best: the best evaluation so far, if evaluations are compared.
        stopped_by: name of the signal on which all ranks agreed to stop.
        clock: time spent on steps.
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
        self.clock = Clock(world.device)
        self.phase = SETTING_UP
        self._ended = False

    @property
    def phase(self) -> str:
        """What this rank is doing, for people and the watchdog; set it where a phase begins."""
        return self.world.activity.phase

    @phase.setter
    def phase(self, text: str) -> None:
        self.world.activity.phase = text

    @property
    def position(self) -> str:
        """Where this rank is: phase and pipeline action, to report a failure."""
        return self.world.activity.position

    def end(self) -> None:
        """Make the current step the last one. Call on all ranks."""
        self._ended = True

    def first_microbatch(self) -> Batch:
        """Read the microbatch with which this rank's next step begins.

        Raises:
            TriaxisError: the data cannot be read.
        """
        return next(self._batches(num_workers=0))[0]

    def steps(self, stop: StopRequest) -> Iterator[StepResult]:
        """Train until `train.steps`, `end()`, or any rank's stop request.

        Raises:
            DataError: on all ranks, a step has no target tokens.
        """
        step = self.progress.step + 1
        self.phase = f"step {step}, reading data"
        for microbatches in self._batches(self.config.data.num_workers):
            self.phase = f"step {step}, waiting for the data of all ranks"
            tokens = self._agree(microbatches, stop)
            self.phase = f"step {step}, training"
            if self.stopped_by:
                return
            if tokens == 0:
                text = f"step {step} has no target tokens; check the masks of the data (triaxis inspect)"
                raise on_all_ranks(self.world, DataError(text))
            lr = learning_rate(step, self.config.optimizer.lr, self.config.lr_schedule, self.config.train.steps)
            result = train_step(self.model, self.optimizer, microbatches, step=step, lr=lr, tokens=tokens)
            samples = self.progress.samples + self.config.batch.global_
            self.progress = Progress(step, samples, self.progress.tokens + tokens)
            self.world.activity.is_warm = True
            yield result
            if self._ended:
                return
            step += 1
            self.phase = f"step {step}, reading data"

    def _agree(self, microbatches: list[Batch], stop: StopRequest) -> int:
        """Return the target tokens of the global batch; set `stopped_by` if any rank got a signal. One collective."""
        signaled = [int(stop.signal == known) for known in STOP_SIGNALS]
        targets = sum(batch.num_tokens for batch in microbatches) if self.world.is_model_parallel_leader else 0
        targets, *counts = sum_ints(self.world, [targets, *signaled])
        self.stopped_by = next((known.name for known, count in zip(STOP_SIGNALS, counts, strict=True) if count), None)
        return targets

    def _batches(self, num_workers: int) -> Iterator[list[Batch]]:
        first, steps = self.progress.samples, self.config.train.steps - self.progress.step
        data, config, world = self.data, self.config, self.world
        return global_batches(data, config, world, first_sample=first, steps=steps, num_workers=num_workers)

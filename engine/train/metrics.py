"""Metrics of a run: loss, gradient norm, speed and memory of the steps since the last report.

Metrics stay on the device until a report is due, and are then fetched with one small reduction and one read.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.errors import NonFiniteError
from engine.formatting import duration
from engine.parallel.agreement import on_all_ranks
from engine.plan.describe import LONG_SILENCE_S
from engine.plan.memory import GIB
from engine.plan.throughput import peak_tflops
from engine.train.hooks import Hook, is_due
from engine.train.log import RunLog
from engine.train.step import StepResult
from engine.train.trainer import Trainer


class StepReporter(Hook):
    """Accumulate metrics over steps, report them at intervals, and abort after too many non-finite steps in a row.

    Args:
        intervals: reports are due at multiples of any of these, and at the last step.
        flops_per_step: FLOPs of the whole global batch.
        sequences_per_epoch: None if the data have no epochs.
    """

    phase = "reporting metrics"

    def __init__(
        self,
        trainer: Trainer,
        log: RunLog,
        intervals: Sequence[int],
        flops_per_step: float,
        sequences_per_epoch: int | None,
    ) -> None:
        self.log, self.intervals = log, intervals
        self.flops_per_step, self.sequences_per_epoch = flops_per_step, sequences_per_epoch
        self.unit = "target_tokens" if trainer.config.task == "sft" else "tokens"
        device = trainer.world.device
        self.peak_tflops = peak_tflops(device)
        self.consecutive_skipped = torch.zeros(1, device=device)
        self.skipped = torch.zeros(1, device=device)  # since the last report, as are tokens and steps
        self.tokens = self.steps = 0

    def before_training(self, trainer: Trainer) -> None:
        self.first_step = trainer.progress.step + 1
        trainer.clock.restart()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Add a step to the metrics, and report them if a report is due.

        Raises:
            NonFiniteError: on all ranks, after `train.max_nonfinite_steps` consecutive skipped steps.
        """
        self.consecutive_skipped = (self.consecutive_skipped + 1) * result.skipped
        self.skipped += result.skipped
        self.tokens += result.tokens
        self.steps += 1
        if any(is_due(result.step, every, trainer.config.train.steps) for every in self.intervals):
            self._report(trainer, result)
        elif result.step == self.first_step:
            self._warn_of_silence(trainer, result)

    def _warn_of_silence(self, trainer: Trainer, result: StepResult) -> None:
        """Say when the first report comes, if it is minutes away."""
        result.loss.item()  # waits for the device
        step, total, took = result.step, trainer.config.train.steps, trainer.clock.seconds()
        report = min(total, *(step // every * every + every for every in self.intervals if every))
        if took * (report - step) > LONG_SILENCE_S:
            self.log.say(
                f"warning     the first step took {took:.1f} s, and the first one in the log is step {report}, in "
                f"about {duration(took * (report - step))}; to see one sooner, lower log.interval = {self.intervals[0]}"
            )

    def _report(self, trainer: Trainer, result: StepResult) -> None:
        loss = result.loss.clone()
        trainer.world.sum_on_device(loss)
        on_device = (loss, result.grad_norm, self.skipped, self.consecutive_skipped)
        mean_loss, grad_norm, skipped, consecutive_skipped = torch.cat(on_device).tolist()
        record = self._record(trainer, result, mean_loss, grad_norm, int(skipped))
        self.log.say(self._line(record, trainer.config.train.steps))
        self.log.metrics("train", record)
        if record["skipped"]:
            self.log.event("skip", step=result.step, skipped=record["skipped"])
        limit = trainer.config.train.max_nonfinite_steps
        if consecutive_skipped >= limit:
            text = (
                f"the last {int(consecutive_skipped)} steps up to {result.step} had NaN or infinite gradients (loss "
                f"{record['loss']}) and were skipped; train.max_nonfinite_steps = {limit}"
            )
            raise on_all_ranks(trainer.world, NonFiniteError(text))
        trainer.clock.restart()
        self.skipped.zero_()
        self.tokens = self.steps = 0

    def _record(
        self, trainer: Trainer, result: StepResult, loss: float, grad_norm: float, skipped: int
    ) -> dict[str, Any]:
        seconds = max(trainer.clock.seconds(), 1e-9)
        devices, progress = trainer.world.layout.world_size, trainer.progress
        per_device = self.tokens / seconds / devices
        tflops = self.flops_per_step * self.steps / seconds / devices / 1e12
        return {
            "step": result.step,
            "time": time.time(),
            "loss": loss,
            "lr": result.lr,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "samples": progress.samples,
            **({} if self.sequences_per_epoch is None else {"epoch": progress.samples / self.sequences_per_epoch}),
            "step_time_s": seconds / self.steps,
            f"{self.unit}_per_s": per_device * devices,
            f"{self.unit}_per_s_per_device": per_device,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "memory_gib": _memory_gib(trainer.world.device),
            "skipped": skipped,
        }

    def _line(self, record: Mapping[str, Any], total: int) -> str:
        mfu = "n/a" if record["mfu"] is None else f"{record['mfu']:.1%}"
        parts = [
            f"step {record['step']:>{len(str(total))}}/{total}",
            *([] if self.sequences_per_epoch is None else [f"epoch {record['epoch']:.2f}"]),
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record[f'{self.unit}_per_s']:,.0f} {self.unit.replace('_', ' ')}/s",
            f"{record['tflops_per_device']:.3g} TFLOP/s per device",
            f"MFU {mfu}",
            f"{record['memory_gib']:.1f} GiB",
            f"ETA {duration((total - record['step']) * record['step_time_s'])}",
        ]
        if record["skipped"]:
            parts.append(f"{record['skipped']} skipped: NaN or infinite gradients")
        return " | ".join(parts)


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

"""What a run reports: a line on the terminal, `metrics.jsonl`, TensorBoard, and `events.jsonl`.

Numbers stay on the device until a logged step; then one small reduction and one read fetch all of them.
"""

import fcntl
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import torch

from engine.config.schema import Config
from engine.errors import ConfigError, NonFiniteError
from engine.parallel.layout import World
from engine.plan.memory import GIB
from engine.plan.throughput import peak_tflops
from engine.train.step import StepResult
from engine.train.trainer import Progress


class RunLog:
    """The files of a run directory that grow with the run. On ranks other than the main one it does nothing."""

    def __init__(self, directory: Path, *, active: bool) -> None:
        self.directory = directory
        self.active = active
        self.tensorboard: Any = None
        if active:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory / "lock")

    def open_metrics(self, last_step: int, *, tensorboard: bool) -> None:
        """Begin to record behind `last_step`; what an earlier start recorded beyond it is replaced."""
        if not self.active:
            return
        _drop_steps_after(self.directory / "metrics.jsonl", last_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.tensorboard = SummaryWriter(str(self.directory / "tensorboard"), purge_step=last_step + 1)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            print(text, flush=True)

    def metrics(self, group: str, record: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl` and to TensorBoard's `group`; NaN becomes null, as JSON has none."""
        if not self.active:
            return
        _append(self.directory / "metrics.jsonl", record)
        if self.tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    where = "perf" if name in _PERFORMANCE else group
                    self.tensorboard.add_scalar(f"{where}/{name}", value, record["step"])

    def event(self, kind: str, **fields: Any) -> None:
        """Append to `events.jsonl`: something that happened once."""
        if self.active:
            _append(self.directory / "events.jsonl", {"event": kind, "time": time.time(), **fields})

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.active:
            self._lock.close()


_PERFORMANCE = {"step_time_s", "tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "mfu", "memory_gib"}


class StepReporter:
    """Watches every step, reports every `log.interval`-th, and gives up when the numbers stay broken."""

    def __init__(self, config: Config, world: World, log: RunLog, flops_per_step: float, rows: int | None) -> None:
        """`rows`: sequences of an epoch, where there are epochs."""
        self.config = config
        self.world = world
        self.log = log
        self.flops_per_step = flops_per_step
        self.rows = rows
        self.peak = peak_tflops(world.device)
        self.consecutive = torch.zeros(1, device=world.device)  # steps skipped in a row
        self.skipped = torch.zeros(1, device=world.device)  # steps skipped since the last report
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure the speed from now on."""
        self.since, self.tokens_since, self.steps_since = time.perf_counter(), 0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the measured speed."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # queued steps belong to the speed
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def __call__(self, result: StepResult, progress: Progress, *, now: bool = False) -> None:
        """Note a step; report it when it is due, or `now`.

        Raises:
            NonFiniteError: on all ranks, when `train.max_nonfinite_steps` in a row had to be skipped.
        """
        self.consecutive = (self.consecutive + 1) * result.skipped
        self.skipped += result.skipped
        self.tokens_since += result.tokens
        self.steps_since += 1
        config = self.config
        if not now and result.step % config.log.interval:
            return
        loss = result.loss.clone()
        self.world.sum_on_device(loss)
        numbers = torch.cat((loss, result.grad_norm, self.skipped, self.consecutive)).tolist()
        record = self._record(result, numbers, progress)
        self.log.say(self._line(record))
        self.log.metrics("train", record)
        if record["skipped"]:
            self.log.event("skip", step=result.step, skipped=record["skipped"])
        if numbers[3] >= config.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"the last {int(numbers[3])} steps up to {result.step} had NaN or infinite gradients (loss "
                f"{record['loss']}) and were skipped; train.max_nonfinite_steps = {config.train.max_nonfinite_steps}"
            )
        self.restart_clock()
        self.skipped.zero_()

    def _record(self, result: StepResult, numbers: list[float], progress: Progress) -> dict[str, Any]:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        devices = self.world.layout.world_size
        per_device = self.tokens_since / seconds / devices
        tflops = self.flops_per_step * self.steps_since / seconds / devices / 1e12
        return {
            "step": result.step,
            "time": time.time(),
            "loss": numbers[0],
            "lr": result.lr,
            "grad_norm": numbers[1],
            "tokens": progress.tokens,
            "samples": progress.samples,
            **({} if self.rows is None else {"epoch": progress.samples / self.rows}),
            "step_time_s": seconds / self.steps_since,
            "tokens_per_s": per_device * devices,
            "tokens_per_s_per_device": per_device,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "memory_gib": _memory_gib(self.world.device),
            "loss_scale": None,
            "skipped": int(numbers[2]),
        }

    def _line(self, record: Mapping[str, Any]) -> str:
        total = self.config.train.steps
        mfu = "n/a" if record["mfu"] is None else f"{record['mfu']:.1%}"
        parts = [
            f"step {record['step']:>{len(str(total))}}/{total}",
            *([] if self.rows is None else [f"epoch {record['epoch']:.2f}"]),
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record['tokens_per_s']:,.0f} {'target ' * (self.config.task == 'sft')}tokens/s",
            f"{record['tflops_per_device']:.3g} TFLOP/s per device",
            f"MFU {mfu}",
            f"{record['memory_gib']:.1f} GiB",
            f"ETA {duration((total - record['step']) * record['step_time_s'])}",
        ]
        if record["skipped"]:
            parts.append(f"{record['skipped']} skipped: NaN or infinite gradients")
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """`1d 02:03:04`, `2:03:04` or `3:04`."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{second:02}"
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _lock(path: Path) -> BinaryIO:
    """Make sure that one run at a time writes here; the lock ends with the process.

    Raises:
        ConfigError: another process holds it.
    """
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"run.dir = {path.parent}: another run is writing there; wait for it or choose another"
        ) from None
    return file


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(orjson.dumps(record) + b"\n")


def _drop_steps_after(path: Path, last_step: int) -> None:
    """Remove the lines of steps that a resumed run is going to repeat, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if orjson.loads(line)["step"] <= last_step:
                kept.append(line)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)

"""The files of a run directory that grow with the run: `metrics.jsonl`, `events.jsonl`, and what trackers write."""

import fcntl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from engine.config.schema import LogConfig
from engine.errors import ConfigError


class Tracker(Protocol):
    """Where else the records of `metrics.jsonl` go, on the main rank alone; `TensorBoard` is one.

    To add Weights & Biases, write a class with these methods and a line in `RunLog.open_metrics`:

        class WeightsAndBiases:
            def __init__(self, directory, last_step):
                self.run = wandb.init(dir=directory, resume="allow")

            def record(self, group, record):
                self.run.log({f"{group}/{name}": value for name, value in record.items()}, step=record["step"])

            def close(self):
                self.run.finish()
    """

    def record(self, group: str, record: Mapping[str, Any]) -> None:
        """Note a record with its `step`; `group` is "train" or "eval"."""

    def close(self) -> None:
        """The run is over."""


class RunLog:
    """The log of a run: lines for people, events, and records of numbers. Does nothing but on the main rank."""

    def __init__(self, directory: Path, *, active: bool) -> None:
        """Lock the directory, if this rank is the one that writes.

        Raises:
            ConfigError: another run writes into this directory.
        """
        self.directory = directory
        self.active = active
        self.trackers: list[Tracker] = []
        if active:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory / "lock")

    def open_metrics(self, last_step: int, config: LogConfig) -> None:
        """Begin to record after `last_step`; what an earlier start recorded beyond it is replaced."""
        if not self.active:
            return
        _drop_steps_after(self.directory / "metrics.jsonl", last_step)
        if config.tensorboard:
            self.trackers.append(TensorBoard(self.directory / "tensorboard", last_step))

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            print(text, flush=True)

    def metrics(self, group: str, record: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl`, where NaN becomes null as JSON has none, and pass on to the trackers."""
        if not self.active:
            return
        _append(self.directory / "metrics.jsonl", record)
        for tracker in self.trackers:
            tracker.record(group, record)

    def event(self, kind: str, **fields: Any) -> None:
        """Append to `events.jsonl`: something that happened once."""
        if self.active:
            _append(self.directory / "events.jsonl", {"event": kind, "time": time.time(), **fields})

    def close(self) -> None:
        """Close the trackers and let another run write here."""
        for tracker in self.trackers:
            tracker.close()
        if self.active:
            self._lock.close()


class TensorBoard:
    """A curve for each number: `train/`, `eval/`, and `perf/` for speed and memory."""

    def __init__(self, directory: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer: Any = SummaryWriter(str(directory), purge_step=last_step + 1)

    def record(self, group: str, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                where = "perf" if name.endswith(_PERFORMANCE) else group
                self._writer.add_scalar(f"{where}/{name}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


_PERFORMANCE = ("step_time_s", "tokens_per_s", "_per_device", "mfu", "memory_gib")


def _lock(path: Path) -> BinaryIO:
    """Make sure that one run at a time writes here; the lock ends with the process."""
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

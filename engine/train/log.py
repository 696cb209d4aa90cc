"""Logs of a run: stdout, `metrics.jsonl`, `events.jsonl`, and experiment trackers."""

import fcntl
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from engine.config.schema import Config
from engine.errors import ConfigError
from engine.heartbeat import Heartbeat
from engine.train.sink import Sink


class Tracker(Protocol):
    """Experiment tracker: receives the records of `metrics.jsonl`, only on the main rank, in a thread of its own, where
    it may fail and hang. `TensorBoard` is one.

    To add Weights & Biases, write this class, and add `self.track(WeightsAndBiases(self.directory, last_step, config))`
    to `RunLog.open_metrics`:

        class WeightsAndBiases:
            def __init__(self, directory, last_step, config):
                run_id = uuid.uuid5(uuid.NAMESPACE_URL, str(directory.resolve())).hex  # the same after a restart
                resume = "allow" if last_step else None  # None replaces the run of a start that saved no checkpoint
                settings = config.model_dump(mode="json", by_alias=True)
                self.run = wandb.init(id=run_id, resume=resume, dir=directory, config=settings)

            def record(self, group, record):  # W&B ignores repeated steps
                self.run.log({f"{group}/{name}": value for name, value in record.items()}, step=record["step"])

            def close(self):
                self.run.finish()
    """

    def record(self, group: str, record: Mapping[str, Any]) -> None:
        """Log a record, which contains its `step`; `group` is "train" or "eval"."""

    def close(self) -> None:
        """Flush and close, at the end of the run."""


class RunLog:
    """The log of a run: messages on stdout, events, and metrics. A no-op on all but the main rank.

    Once it is open, training neither ends nor waits because a file or a tracker fails; see `Sink`.
    """

    def __init__(self, directory: Path, *, active: bool, heartbeat: Heartbeat | None = None) -> None:
        """Lock the directory, if this rank is the one that writes.

        Args:
            heartbeat: what gives signs of life between messages; None: nothing does.

        Raises:
            ConfigError: another run is writing to this directory.
        """
        self.directory = directory
        self.active = active
        self.heartbeat = heartbeat or Heartbeat("", active=False)
        self._files = {name: Sink(name, self.say) for name in ("metrics.jsonl", "events.jsonl")}
        self._trackers: list[tuple[Tracker, Sink]] = []
        if active:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory / "lock")

    def open_metrics(self, last_step: int, config: Config) -> None:
        """Open the metrics to continue after `last_step`; records of later steps are dropped."""
        if not self.active:
            return
        _drop_steps_after(self.directory / "metrics.jsonl", last_step)
        if config.log.tensorboard:
            try:
                self.track(TensorBoard(self.directory / "tensorboard", last_step))
            except (OSError, ImportError) as error:
                self.say(f"warning     TensorBoard's files cannot be written ({error}); training goes on")

    def track(self, tracker: Tracker, sink: Sink | None = None) -> None:
        """Send the metrics to `tracker` too, through `sink` (default: one with its name)."""
        self._trackers.append((tracker, sink or Sink(type(tracker).__name__, self.say)))

    def say(self, text: str) -> None:
        """Print a line on stdout."""
        if self.active:
            self.heartbeat.say(text)

    def metrics(self, group: str, record: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl` (NaN becomes null, as JSON has no NaN) and send to the trackers."""
        if not self.active:
            return
        self._append("metrics.jsonl", record)
        for tracker, sink in self._trackers:
            sink.put(partial(tracker.record, group, record))

    def event(self, kind: str, **fields: Any) -> None:
        """Append a one-time event to `events.jsonl`."""
        if self.active:
            self._append("events.jsonl", {"event": kind, "time": time.time(), **fields})

    def close(self) -> None:
        """Write what is left, close the trackers, and release the lock on the run directory."""
        for tracker, sink in self._trackers:
            sink.close(tracker.close)
        for sink in self._files.values():
            sink.close()
        if self.active:
            self._lock.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = orjson.dumps(record) + b"\n"
        self._files[name].put(partial(_append, self.directory / name, line))


class TensorBoard:
    """TensorBoard tracker: one curve per metric, under `train/`, `eval/`, and `perf/` for speed and memory."""

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
    """Lock the run directory against other runs; the lock is released when the process ends.

    A fork, such as a data worker, may outlive this process, and gives up its share of the lock at once.
    """
    file = path.open("wb")
    os.register_at_fork(after_in_child=file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"run.dir = {path.parent}: another run is writing there; wait for it or choose another"
        ) from None
    return file


def _append(path: Path, line: bytes) -> None:
    with path.open("ab", buffering=0) as file:  # one call: other processes append as well
        file.write(line)


def _drop_steps_after(path: Path, last_step: int) -> None:
    """Remove the lines of steps that a resumed run repeats, and a line truncated by a crash."""
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

"""Training runs in which one rank gets stuck or dies, on real ranks, and what is left of them."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from engine.checkpoint.save import save
from engine.config.schema import Config
from engine.parallel import data
from engine.parallel.collectives import CompletedWork, reduce_scatter
from engine.testing.distributed import run_ranks
from engine.testing.runs import read_records
from engine.train import saving, trainer
from engine.train.run import train
from engine.train.step import train_step


def stop() -> None:
    """Stop this process."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_lock() -> None:
    """Wait for a lock that nobody releases."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def hold_interpreter() -> None:
    """Sleep without releasing the interpreter lock."""
    ctypes.PyDLL(None).sleep(600)


def stop_reader() -> None:
    """Stop the data loader processes, of which the next batch is waited for."""
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGSTOP)


def kill() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    """Fail."""
    raise ValueError("broken on purpose")


IN_STEP: dict[str, Callable[[], None]] = {
    "stopped": stop,
    "lock": hold_lock,
    "interpreter": hold_interpreter,
    "reader": stop_reader,
    "killed": kill,
    "crash": crash,
}
FAULT_KINDS = (*IN_STEP, "save", "skip")


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        seconds: from the fault until the last rank had ended.
        reports: the error messages on stderr, of all ranks.
        codes: what `run_ranks` says of the ranks.
        events: the run's events.
    """

    seconds: float
    reports: list[str]
    codes: str
    events: list[dict[str, Any]]


def run_stuck(config: Config, world_size: int, kind: str, rank: int, step: int = 3) -> End:
    """Train on real ranks, of which `rank` gets stuck or dies in `step` as `kind` of `FAULT_KINDS` says."""
    directory = config.run.dir.parent
    try:
        run_ranks(world_size, _train_stuck, config, kind, rank, step, timeout_s=60)
        codes = "finished"
    except RuntimeError as error:
        codes = str(error)
    ended = time.time()
    said = "".join((directory / f"stderr{one}").read_text(encoding="utf-8") for one in range(world_size))
    reports = [line for line in said.splitlines() if line.startswith("error: ")]
    failed = directory / "failed_at"
    seconds = ended - float(failed.read_text(encoding="utf-8")) if failed.exists() else 0.0
    return End(seconds, reports, codes, read_records(config.run.dir / "events.jsonl"))


def _train_stuck(config: Config, kind: str, rank: int, step: int) -> None:
    here, directory = int(os.environ["RANK"]), config.run.dir.parent
    os.dup2(os.open(directory / f"stderr{here}", os.O_WRONLY | os.O_CREAT), 2)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # it may have readers
    if here == rank:
        _plant(kind, step, directory)
    train(config)


def _plant(kind: str, step: int, directory: Path) -> None:
    def failing(function: Callable[..., Any], fail: Callable[[], None], at: int) -> Callable[..., Any]:
        calls = 0

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                (directory / "failed_at").write_text(str(time.time()), encoding="utf-8")
                fail()
            return function(*arguments, **options)

        return call

    if kind == "save":
        mock.patch.object(saving, "save", failing(save, hold_lock, 1)).start()
    elif kind == "skip":
        _skip_collective(step, directory)
    else:
        mock.patch.object(trainer, "train_step", failing(train_step, IN_STEP[kind], step)).start()


def _skip_collective(step: int, directory: Path) -> None:
    """Leave out the exchange of gradients of `step`."""
    skips = False

    def skipping(*arguments: Any, **options: Any) -> Any:
        nonlocal skips
        skips = options["step"] == step
        if skips:
            (directory / "failed_at").write_text(str(time.time()), encoding="utf-8")
        return train_step(*arguments, **options)

    def exchanging(*arguments: Any, **options: Any) -> Any:
        nonlocal skips
        if skips:
            skips = False
            return CompletedWork()
        return reduce_scatter(*arguments, **options)

    mock.patch.object(trainer, "train_step", skipping).start()
    mock.patch.object(data, "reduce_scatter", exchanging).start()

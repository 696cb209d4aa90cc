"""Hangs and deaths of one rank: noticed in time, blamed on that rank, reported once, survived by none."""

import json
import math
import os
import re
import signal
import socket
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from engine.parallel.activity import Activity, Limits
from engine.parallel.layout import Layout, World
from engine.testing.distributed import run_ranks
from engine.testing.runs import read_records, run_config, run_until_signal
from engine.testing.stuck import End, run_stuck
from engine.train import trainer
from engine.train.guard import Guard
from engine.train.log import _append
from engine.train.run import train
from engine.train.step import train_step
from engine.train.watchdog import Watchdog

LIMIT_S = 2.0
HERE = re.escape(socket.gethostname())


def end_of(workspace: Path, kind: str, ranks: int, rank: int, *overrides: str) -> End:
    options = ["--parallel.hang_s", str(LIMIT_S), "--checkpoint.interval", "4", *overrides]
    return run_stuck(run_config(workspace, *options, steps=40), ranks, kind, rank)


@pytest.mark.parametrize(
    ("kind", "ranks", "rank", "options", "reason"),
    [
        ("stopped", 4, 2, ["--parallel.tp", "2"], r"is stopped \(SIGSTOP\): step 3, training"),
        ("lock", 2, 0, ["--parallel.pp", "2"], r"is in step 3, training, at stuck.py:\d+ hold_lock"),
        ("interpreter", 2, 1, [], "cannot run Python, as a thread holds the interpreter lock: step 3, training"),
        (
            "reader",
            2,
            1,
            ["--data.num_workers", "1"],
            r"waits for its process \d+, which is stopped: step \d+, reading data",
        ),
        ("save", 2, 1, [], r"is in step 4, saving a checkpoint, at stuck.py:\d+ hold_lock"),
        ("skip", 4, 2, [], r"has not come to call \d+ of dp, in which rank \d waits: step \d+, "),
    ],
)
def test_a_hang_is_noticed_and_blamed_on_the_right_rank(workspace, kind, ranks, rank, options, reason):
    end = end_of(workspace, kind, ranks, rank, *options)
    (report,) = end.reports
    assert re.match(rf"error: no progress for 2 s: rank {rank} \({HERE}\) {reason}", report), report
    assert end.codes.count("exit code 70") >= ranks - 1, end.codes  # one whose interpreter is held is killed
    # a rank that was stopped goes on until it is ended, and may save meanwhile
    assert [event["code"] for event in end.events if event["event"] == "exit"] == [70]
    slack = 2.0 + 4.0 * (kind == "reader")  # the batches that were read ahead
    assert end.seconds < LIMIT_S + slack + 3.0  # a busy machine
    files = sorted((workspace / "run/hangs").iterdir())
    assert [file.name for file in files] == [f"rank_{one}.txt" for one in range(ranks)]
    assert all("most recent call first" in file.read_text() for file in files)


@pytest.mark.parametrize(("kind", "said"), [("killed", 1), ("crash", 0)])
def test_a_rank_that_ends_takes_all_others_along(workspace, kind, said):
    """Stage 0 hears nothing from gloo when the last stage dies, and has to be told."""
    end = end_of(workspace, kind, 4, 3, "--parallel.pp", "4", "--batch.global", "8")
    assert len(end.reports) == said  # a crash is reported by `run_program`
    place = rf"rank 3 \({HERE}\), step 3, training"
    assert re.search(place, end.reports[0] if said else end.codes)
    assert "has not finished" not in end.codes
    assert end.seconds < 5


def test_a_process_alone_is_watched_too(workspace):
    end = end_of(workspace, "lock", 1, 0)
    assert "exit code 70" in end.codes
    assert end.reports[0].startswith("error: no progress for 2 s: ")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves(workspace, number):
    config = run_config(workspace, steps=10_000)
    assert all("the state is saved" in said for said in run_until_signal(config, 2, 3, number, rank=1))


def test_limits_are_learned_by_phase():
    limits = Limits(most=1000.0)
    assert limits.of("saving a checkpoint", None) == math.inf  # the first one may take hours
    assert limits.of("training FORWARD", 0.1) == 300
    assert limits.of("training FORWARD", 40.0) == 400
    assert limits.of("saving a checkpoint", 1.0) == 600
    assert limits.of("saving a checkpoint", 200.0) == 1000
    assert limits.of("saving a checkpoint", 2000.0) == 4000
    assert Limits(fixed=5.0).of("saving a checkpoint", 200.0) == 5


def test_activity_learns_the_longest_phase_of_a_kind():
    activity = Activity()
    activity.limits = Limits(most=1e6)
    activity.phase = "step 1, training"
    assert activity.note().limit_s == math.inf
    activity.is_warm = True
    for step, seconds in enumerate((0.05, 0.0), start=1):
        activity.phase = f"step {step}, training"
        activity.act("pipeline stage 0, F0", "FORWARD")
        time.sleep(seconds)
        activity.act("", "")
    activity.phase = "step 3, training"
    activity.act("pipeline stage 0, F0", "FORWARD")
    note = activity.note()
    assert note.text == activity.position == "step 3, training, pipeline stage 0, F0"
    assert note.limit_s == 300
    assert 0.05 <= activity._longest["training FORWARD"] < 1
    assert set(activity._longest) == {"training", "training FORWARD"}


def _train_suspended(config) -> None:
    """Train; every rank is stopped in step 3, and continued later, as by a person or a scheduler."""
    calls = 0

    def suspended(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 3:
            if os.fork() == 0:
                time.sleep(2 * LIMIT_S)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        return train_step(*arguments, **options)

    with mock.patch.object(trainer, "train_step", suspended):
        train(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_suspended_run_goes_on(workspace, ranks):
    config = run_config(workspace, "--parallel.hang_s", str(LIMIT_S), steps=5)
    run_ranks(ranks, _train_suspended, config)
    assert read_records(workspace / "run/metrics.jsonl")[-1]["step"] == 5
    assert not (workspace / "run/hangs").exists()


class Suspendable(Guard):
    """A guard without a process; `_is_late` alone."""

    def __init__(self, activity: Activity) -> None:
        self.activity, self.seat = activity, SimpleNamespace(pid=os.getpid())
        self._looked = self._resumed = time.monotonic()


def test_time_in_which_the_host_was_suspended_does_not_count():
    activity = Activity()
    activity.limits, activity.is_warm = Limits(fixed=60.0), True
    activity.phase = "step 1, training"
    guard, now = Suspendable(activity), time.monotonic()
    with mock.patch("time.monotonic") as clock:
        clock.return_value = now + 3600.0  # a frozen container: the guard did not run either
        assert not guard._is_late()
        for second in range(1, 63):
            clock.return_value = now + 3600.0 + second
            assert guard._is_late() == (second > 60)


def _guards(watchdog: Watchdog) -> list[int]:
    """Other processes that hold the memory for the stacks, under the same number."""
    stacks, found = watchdog._stacks, []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if os.path.samestat(os.stat(process / f"fd/{stacks}"), os.fstat(stacks)):
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def _watch(tmp_path: Path) -> Watchdog:
    return Watchdog(World(Layout(), 0, 0, 1, torch.device("cpu")), Limits(), tmp_path)


def test_no_guard_is_left(tmp_path):
    with _watch(tmp_path) as watchdog:
        (guard,) = _guards(watchdog)
    until = time.monotonic() + 10
    while Path(f"/proc/{guard}/fd").exists() and os.listdir(f"/proc/{guard}") and time.monotonic() < until:
        try:
            if not os.listdir(f"/proc/{guard}/fd"):  # a zombie, where process 1 collects none
                return
        except OSError:
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{guard}").exists()


def test_a_killed_guard_is_no_failure(tmp_path):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with _watch(tmp_path) as watchdog:
            (guard,) = _guards(watchdog)
            os.kill(guard, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGUSR1)  # unread: the end of the guard resets the connection
            os.kill(guard, signal.SIGKILL)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_null_is_no_guard(tmp_path):
    with Watchdog(World(Layout(), 0, 0, 1, torch.device("cpu")), None, tmp_path) as watchdog:
        assert watchdog._line is None


@pytest.mark.parametrize("missing", ["memfd_create", "fork"])
def test_a_run_goes_on_without_a_guard(tmp_path, capfd, missing):
    error = OSError(11, "Resource temporarily unavailable")
    with mock.patch.object(os, missing, side_effect=error), _watch(tmp_path) as watchdog:
        assert watchdog._line is None
    said = capfd.readouterr().err
    assert said == f"warning     no watchdog for rank 0: hangs are not noticed ({error})\n"


def _append_events(directory: Path, writer: int) -> None:
    guard = SimpleNamespace(seat=SimpleNamespace(run_dir=directory))
    for number in range(200):
        text = "x" * (number * 97 % 20_000)
        if writer % 2:
            Guard._record(guard, "killed", writer=writer, number=number, text=text)
        else:
            line = json.dumps({"writer": writer, "number": number, "text": text})
            _append(directory / "events.jsonl", line.encode() + b"\n")


def test_events_of_several_processes_are_not_torn(tmp_path):
    writers = [get_context("fork").Process(target=_append_events, args=(tmp_path, writer)) for writer in range(6)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    events = read_records(tmp_path / "events.jsonl")
    assert sorted((event["writer"], event["number"]) for event in events) == [
        (w, n) for w in range(6) for n in range(200)
    ]

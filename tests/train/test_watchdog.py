"""Hangs and deaths of one rank: noticed in time, blamed on that rank, reported once, survived by none."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from engine.parallel.activity import Activity, Limits
from engine.testing.runs import run_config, run_until_signal
from engine.testing.stuck import End, run_stuck

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
    assert end.events[-1]["code"] == 70
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
    assert limits.of("training FORWARD", None) == 1000
    assert limits.of("training FORWARD", 0.1) == 120
    assert limits.of("training FORWARD", 30.0) == 300
    assert limits.of("saving a checkpoint", 1.0) == 600
    assert limits.of("saving a checkpoint", 200.0) == 1000
    assert Limits(fixed=5.0).of("saving a checkpoint", 200.0) == 5


def test_activity_learns_the_longest_phase_of_a_kind():
    activity = Activity()
    activity.limits = Limits(most=1e6)
    activity.phase = "step 1, training"
    assert activity.note().limit_s == 1e6
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
    assert note.limit_s == 120
    assert 0.05 <= activity._longest["training FORWARD"] < 1
    assert set(activity._longest) == {"training", "training FORWARD"}

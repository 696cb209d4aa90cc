import math
import multiprocessing
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.testing.runs import read_records, run_config
from engine.train.log import RunLog
from engine.train.sink import Sink


class Collecting:
    def __init__(self) -> None:
        self.records: list[tuple[str, Mapping[str, Any]]] = []
        self.closed = False

    def record(self, group: str, record: Mapping[str, Any]) -> None:
        self.records.append((group, record))

    def close(self) -> None:
        self.closed = True


def test_a_tracker_gets_what_metrics_jsonl_gets(tmp_path):
    log, tracker = RunLog(tmp_path, active=True), Collecting()
    log.open_metrics(0, run_config(tmp_path))
    log.track(tracker)
    log.metrics("train", {"step": 1, "loss": math.nan})
    log.metrics("eval", {"step": 1, "eval_loss": 2.0})
    log.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}, {"step": 1, "eval_loss": 2.0}]
    assert [(group, record["step"]) for group, record in tracker.records] == [("train", 1), ("eval", 1)]
    assert tracker.closed


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("no such project"), None])
def test_a_tracker_that_fails_or_hangs_ends_nothing(tmp_path, capsys, failure):
    """It is said once, with how much was lost; other destinations get everything."""
    released = threading.Event()

    class Bad(Collecting):
        def record(self, group: str, record: Mapping[str, Any]) -> None:
            if failure is None:
                released.wait()
            elif record["step"] > 1:
                raise failure

    log = RunLog(tmp_path, active=True)
    log.open_metrics(0, run_config(tmp_path))
    log.track(Bad(), Sink("Bad", log.say, queued=3, drain_s=0.1) if failure is None else None)
    for step in range(1, 9):
        log.metrics("train", {"step": step})
    log.close()
    released.set()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    said = capsys.readouterr().out.splitlines()
    reason = "does not answer" if failure is None else f"cannot be written ({failure})"
    assert len(said) == 2 and said[0].startswith(f"warning     Bad {reason}")
    assert re.fullmatch(r"warning     Bad: [6-9] of 9 records lost", said[1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_file_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    """As on a full disk, or after somebody has removed the directory."""
    log = RunLog(tmp_path / "run", active=True)
    log.open_metrics(0, run_config(tmp_path, "--log.tensorboard=true"))
    shutil.rmtree(tmp_path / "run")
    log.metrics("train", {"step": 1, "loss": 1.0})
    log.event("save")
    log.close()
    said = capsys.readouterr().out
    assert "metrics.jsonl cannot be written" in said and "events.jsonl: 1 of 1 records lost" in said


def test_a_fork_does_not_hold_the_run_directory(tmp_path):
    log = RunLog(tmp_path, active=True)
    context = multiprocessing.get_context("fork")
    runs, ends = context.Event(), context.Event()
    reader = context.Process(target=lambda: (runs.set(), ends.wait(60)))
    reader.start()
    try:
        assert runs.wait(60)  # the fork is complete
        with pytest.raises(ConfigError, match="another run is writing there"):
            RunLog(tmp_path, active=True)
        log.close()
        RunLog(tmp_path, active=True).close()
    finally:
        reader.kill()
        reader.join()


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", active=False)
    log.open_metrics(0, run_config(tmp_path, "--log.tensorboard=true"))
    log.metrics("train", {"step": 1})
    log.event("start")
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_replaces_the_records_of_the_steps_it_repeats(tmp_path):
    """Also where they have the columns of an older version, or end in the middle of a line."""
    old = b'{"step":1,"tokens_per_s":5.0,"loss_scale":null}\n{"step":2,"tokens_per_s":5.0}\n{"step":3,"tok'
    (tmp_path / "metrics.jsonl").write_bytes(old)
    log = RunLog(tmp_path, active=True)
    log.open_metrics(1, run_config(tmp_path))
    log.metrics("train", {"step": 2, "target_tokens_per_s": 6.0})
    log.close()
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "tokens_per_s": 5.0, "loss_scale": None},
        {"step": 2, "target_tokens_per_s": 6.0},
    ]


def tags(directory: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_tensorboard_has_a_curve_for_each_number(tmp_path):
    log = RunLog(tmp_path, active=True)
    log.open_metrics(0, run_config(tmp_path, "--log.tensorboard=true"))
    log.metrics("train", {"step": 1, "time": 5.0, "loss": 3.0, "mfu": None, "target_tokens_per_s_per_device": 2.0})
    log.metrics("eval", {"step": 1, "time": 5.0, "eval_loss": 3.0})
    log.close()
    assert tags(tmp_path / "tensorboard") == {"train/loss", "eval/eval_loss", "perf/target_tokens_per_s_per_device"}

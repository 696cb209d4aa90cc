"""A run gives a sign of life in each phase, and says at once when its log will be silent for minutes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import pytest

from engine.config.schema import Config
from engine.heartbeat import Heartbeat
from engine.testing.distributed import run_ranks
from engine.testing.runs import read_records, run_config, write_conversations
from engine.train import metrics, run, saving, start, trainer
from engine.train.hooks import Hook
from engine.train.run import train
from engine.train.step import DistributedModel
from engine.train.trainer import Trainer
from tests.e2e.commands import ENVIRONMENT

SLOW_S = 60


def beating(file: TextIO) -> Heartbeat:
    return Heartbeat("starting", file=file, first_s=0.02, interval_s=0.02, tick_s=0.01)


def slow(function: Callable[..., Any], said: Path, sign: str) -> Callable[..., Any]:
    """`function`, which takes until a new sign of life contains `sign`, or a minute."""

    def call(*arguments: Any, **options: Any) -> Any:
        before, end = said.read_text(encoding="utf-8"), time.monotonic() + SLOW_S
        while sign not in said.read_text(encoding="utf-8").removeprefix(before) and time.monotonic() < end:
            time.sleep(0.005)
        assert time.monotonic() < end, f"no sign of life with {sign!r}"
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("place", "name", "sign"),
    [
        (run, "arrange_ranks", "connecting the ranks"),
        (run, "open_inputs", "opening tokenizer, data and checkpoints"),
        (start, "choose_onednn", "measuring implementations of operators"),
        (start, "build_model", "initializing the model"),
        (DistributedModel, "evaluate", "0/3 steps, ETA unknown: before step 1, evaluating, batch 2 of 2"),
        (Trainer, "_agree", "0/3 steps, ETA unknown: step 1, waiting for the data of all ranks"),
        (trainer, "train_step", "0/3 steps, ETA unknown: step 1, training"),
        (saving, "save", "step 2, saving a checkpoint"),
    ],
)
def test_every_phase_that_can_last_gives_a_sign(workspace, place, name, sign):
    config = run_config(workspace, "--train.eval_steps", "2", "--checkpoint.interval", "2", steps=3)
    function, calls = getattr(place, name), 0
    with (workspace / "stderr").open("w", encoding="utf-8") as file:
        slowed = slow(function, Path(file.name), sign)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return (slowed if calls == (2 if name == "evaluate" else 1) else function)(*arguments, **options)

        with patch.object(place, name, call):
            train(config, beating(file))


class SlowHook(Hook):
    """A hook of a user, such as a profiler that writes its trace."""

    phase = "writing a trace"

    def __init__(self, said: Path) -> None:
        self.wait = slow(lambda: None, said, "step 2, writing a trace")

    def after_step(self, trainer: Trainer, result: Any) -> None:
        if result.step == 2:
            self.wait()


def train_on_rank(config: Config, directory: Path) -> None:
    hooks = run._hooks
    rank_0 = directory / "stderr 0"
    rank_0.touch()
    with (
        (directory / f"stderr {os.environ['RANK']}").open("w", encoding="utf-8") as file,
        patch.object(run, "_hooks", lambda *given: [*hooks(*given), (1, SlowHook(rank_0))]),
    ):
        train(config, beating(file))


def test_one_of_two_ranks_speaks_also_in_the_hooks_of_others(workspace):
    run_ranks(2, train_on_rank, run_config(workspace, steps=3), workspace)
    assert "writing a trace" in (workspace / "stderr 0").read_text(encoding="utf-8")
    assert (workspace / "stderr 1").read_text(encoding="utf-8") == ""


def test_the_import_of_torch_gives_a_sign(workspace):
    """In the command, before anything of the run is there; the log on stdout is as ever."""
    code = (
        "import sys; from functools import partial; import engine.cli.train as train\n"
        "train.Heartbeat = partial(train.Heartbeat, first_s=0, tick_s=0.02)\n"
        "assert 'torch' not in sys.modules\n"
        "train.main(sys.argv[1:])"
    )
    (workspace / "run.yaml").write_text(run_config(workspace, steps=2).to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", code, str(workspace / "run.yaml"), "--ranks", "1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].endswith("importing PyTorch")
    assert "finished: 2 steps" in done.stdout and "running  " not in done.stdout


@pytest.mark.parametrize(("limit", "warns"), [(0.0, True), (3600.0, False)])
def test_a_log_that_will_be_silent_says_so_after_the_first_step(workspace, capfd, limit, warns):
    def warning() -> list[str]:
        return [line for line in capfd.readouterr().out.splitlines() if "the first step took" in line]

    settings = ("--log.interval", "5", "--lr_schedule.kind", "constant")
    with patch.object(metrics, "LONG_SILENCE_S", limit):
        train(run_config(workspace, *settings, steps=8))
        said = warning()
        assert len(said) == warns
        assert all("the first one in the log is step 5, in about " in line for line in said)
        train(run_config(workspace, *settings, steps=14))  # resumed after step 8
        said = warning()
        assert len(said) == warns
        assert all("step 10, in" in line and "lower log.interval = 5" in line for line in said)
    steps = [record["step"] for record in read_records(workspace / "run/metrics.jsonl")]
    assert steps == [5, 8, 10, 14]


@pytest.mark.parametrize(("steps", "warns"), [(100, False), (1000, True)])
def test_data_that_are_read_too_often(workspace, capfd, steps, warns):
    """100 steps are 4 · 100 · 32 = 12,800 tokens of about 12,000."""
    config = run_config(workspace, steps=steps)
    with patch.object(run, "_train", lambda *_: None):
        train(config)
    said = [line for line in capfd.readouterr().out.splitlines() if "more than 4 passes" in line]
    assert len(said) == warns
    for line in said:
        assert line.startswith(f"warning     the run reads {workspace / 'corpus'} ")
        fewer = int(line.rpartition(" ")[2])
        assert 300 < fewer < 500


def test_conversations_are_read_more_often(tmp_path, capfd):
    write_conversations(tmp_path / "corpus")  # eight sequences, two steps
    for steps, warns in ((30, False), (40, True)):
        with patch.object(run, "_train", lambda *_: None):
            train(run_config(tmp_path, "--task", "sft", "--data.split", "[1, 0, 0]", steps=steps))
        assert ("more than 16 passes" in capfd.readouterr().out) == warns

"""`triaxis train` starts ranks itself: exit codes, and what is on the screen when a run ends early."""

import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from engine.testing.runs import read_records
from engine.train.log import RunLog
from tests.e2e.commands import ENVIRONMENT, start


def train(workspace: Path, *overrides: str) -> list[str]:
    """A run of seconds on two ranks."""
    return [
        *(sys.executable, "-m", "engine", "train", "tiny", "--ranks", "2", "--run.dir", str(workspace / "run")),
        *("--data.train", f"[{{path: {workspace / 'corpus'}}}]", "--data.seq_length", "32", "--batch.micro", "1"),
        *("--batch.global", "4", "--train.eval_steps", "0", "--log.interval", "1", "--log.tensorboard", "false"),
        *overrides,
    ]


def test_sigterm_ends_with_the_code_of_the_ranks_and_no_traceback(workspace):
    command = train(workspace, "--train.steps", "100000", "--checkpoint.interval", "0")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not read_records(workspace / "run/metrics.jsonl") and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75
    assert said.splitlines()[-1] == "exit 75: rerun the same command to resume"
    assert "Traceback" not in said


def test_a_refusal_that_only_ranks_see_keeps_its_code_and_is_near_the_end(workspace):
    """The run directory is locked by rank 0, after the checks before the start."""
    with closing(RunLog(workspace / "run", active=True)):
        done = start(train(workspace, "--train.steps", "20"), workspace)
    assert done.returncode == 64
    assert "another run is writing there" in done.stderr and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    (said,) = [number for number, line in enumerate(lines) if line.startswith("exit 64:")]
    assert len(lines) - said - 1 <= 3, done.stderr


@pytest.mark.parametrize(
    ("overrides", "code", "expected"),
    [
        (["--trian.steps", "9"], 64, "did you mean 'train'?"),
        (["--batch.global", "3"], 64, "batch.global = 3 is not a multiple of"),
        (["--data.train", "[{path: /nowhere}]"], 65, "/nowhere"),
        (["--model.preset", "llama2-7b", "--model.num_layers", "500"], 72, "GiB per rank"),
    ],
)
def test_a_refusal_comes_before_ranks_and_is_the_last_thing_on_the_screen(workspace, overrides, code, expected):
    done = start(train(workspace, *overrides), workspace)
    assert done.returncode == code
    assert expected in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("running ")]  # signs of life
    assert lines[0].startswith("error: ") and done.stderr.count("exit ") == 1
    assert lines[-1].startswith(f"exit {code}: ")
    assert not (workspace / "run").exists()


def test_a_rank_that_torchrun_started_starts_no_ranks(workspace):
    done = start(train(workspace), workspace, LOCAL_RANK="0")
    assert done.returncode == 64
    assert "--ranks: torchrun has started this process as a rank (LOCAL_RANK is set)" in done.stderr

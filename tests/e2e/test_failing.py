"""A rank that fails alone: what people read, which code they get, and how soon all ranks have ended."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.testing.runs import read_records
from tests.e2e.commands import ENVIRONMENT, ROOT, start

SECONDS = 12
"""Until all ranks have ended, on a busy machine: half of what torchrun gives ranks that do not end by SIGTERM."""
WHERE = rf"\({re.escape(socket.gethostname())}\), step 2, training, pipeline stage 1, F2"


def failing(workspace: Path, kind: str, ranks: int, *overrides: str) -> list[str]:
    """A run on `ranks` ranks in two stages, of which the last one fails."""
    return [
        *(str(ROOT / "tests/e2e/failing.py"), kind, str(ranks - 1), str(ROOT / "examples/configs/tiny.yaml")),
        *("--run.dir", str(workspace / "run"), "--run.device", "cpu", "--parallel.pp", "2", "--parallel.tp", "1"),
        *("--data.train", f"[{{path: {workspace / 'corpus'}}}]", "--data.split", "[80, 20, 0]"),
        *("--data.seq_length", "32", "--batch.micro", "1", "--batch.global", str(2 * ranks), "--train.steps", "9"),
        *("--lr_schedule.warmup_steps", "2", "--log.interval", "1", "--log.tensorboard", "false"),
        *("--ops.measure", "false", *overrides),
    ]


def seconds_since_failure(workspace: Path) -> float:
    return time.time() - float((workspace / "run/failed_at").read_text())


@pytest.mark.parametrize(
    ("kind", "ranks", "code", "report"),
    [
        ("out_of_memory+stuck", 4, "72", rf"error: rank 3 {WHERE}: OutOfMemoryError: CUDA out of memory."),
        ("bug", 2, "1", rf"ValueError: broken on purpose\n(\[rank1\]: |  )?rank 1 {WHERE}\n"),
        ("killed", 2, "-9", "Signal 9"),
    ],
)
def test_a_rank_fails_alone(workspace, kind, ranks, code, report):
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    done = start([*torchrun, *failing(workspace, kind, ranks, "--data.num_workers", "2")], workspace)
    seconds = seconds_since_failure(workspace)
    print(f"{kind}: all {ranks} ranks had ended {seconds:.1f} s after one failed")
    assert done.returncode == 1  # torchrun's
    cause = done.stderr.partition("Root Cause")[2]
    assert re.search(rf"rank +: {ranks - 1} .*\n +exitcode +: {code} ", cause), done.stderr
    assert len(re.findall(report, done.stderr)) == (1 if kind == "killed" else 2), done.stderr  # and torchrun's report
    assert "lost the connection" not in done.stderr
    assert done.stderr.count("exit ") == 2 * (code == "72")
    assert seconds < SECONDS


def test_a_rank_that_is_killed_without_torchrun_is_reported_once_and_takes_the_other_along(workspace):
    """The process beside it reports it on its stderr; the other one is told, and ends in silence."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, *failing(workspace, "killed", 2)]
        environment = ENVIRONMENT | place | meeting
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL))
    try:
        _, said = ranks[0].communicate(timeout=120)
        _, reported = ranks[1].communicate(timeout=20)
        seconds = seconds_since_failure(workspace)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert "error" not in said.decode()
    (report,) = reported.decode().splitlines()
    assert re.match(rf"error: rank 1 {WHERE}: killed, .*; with it end: rank\(s\) 0$", report)
    assert ranks[0].returncode == 69
    assert ranks[1].returncode == -9
    assert seconds < SECONDS
    assert read_records(workspace / "run/events.jsonl")[-1]["code"] == 69

"""A rank that fails alone: what people read, which code they get, and how soon all ranks have ended."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.testing.runs import read_records
from tests.e2e.commands import ENVIRONMENT, ROOT, start

SECONDS = 12
"""Until all ranks have ended, on a busy machine: half of what torchrun gives ranks that do not end by SIGTERM."""
WHERE = rf"\({re.escape(socket.gethostname())}\), step 2, training, pipeline stage 1, F2"


def failing(workspace: Path, kind: str, ranks: int, *overrides: str, rank: int | None = None) -> list[str]:
    """A run on `ranks` ranks in two stages, of which `rank` (default: the last one) fails."""
    at = ranks - 1 if rank is None else rank
    return [
        *(str(ROOT / "tests/e2e/failing.py"), kind, str(at), str(ROOT / "examples/configs/tiny.yaml")),
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
        (
            "killed",
            2,
            "-9",
            "Signal 9|killed, often",
        ),  # of torchrun, or of the process beside the rank if it was faster
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


def without_torchrun(command: list[str], waits_for: Sequence[int] = (0, 1)) -> tuple[list[str], list[int]]:
    """What the ranks of `waits_for`, of two, say on stderr, and the exit codes of both; rank 0 serves the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = ENVIRONMENT | place | meeting
        ranks.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        )
    try:
        said = [ranks[rank].communicate(timeout=120)[1] for rank in waits_for]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [text.decode() for text in said], [process.returncode for process in ranks]


def test_a_rank_that_is_killed_without_torchrun_is_reported_once_and_takes_the_other_along(workspace):
    """The process beside it reports it on its stderr; the other one is told, and ends in silence."""
    (said, reported), codes = without_torchrun(failing(workspace, "killed", 2))
    seconds = seconds_since_failure(workspace)
    assert "error" not in said
    (report,) = reported.splitlines()
    assert re.match(rf"error: rank 1 {WHERE}: killed, .*; with it end: rank\(s\) 0$", report)
    assert codes == [69, -9]
    assert seconds < SECONDS
    assert read_records(workspace / "run/events.jsonl")[-1]["code"] == 69


def test_a_rank_ends_even_if_the_one_that_serves_the_store_is_stopped(workspace):
    """Nobody can tell the stopped one; it ends with its launcher."""
    limit_s = 5
    command = failing(workspace, "stopped", 2, "--parallel.hang_s", str(limit_s), rank=0)
    (said,), codes = without_torchrun(command, waits_for=[1])
    assert codes[1] == 70
    assert re.search(r"error: no progress for 5 s: rank 1 .*; the store does not answer", said), said
    assert seconds_since_failure(workspace) < limit_s + SECONDS

"""What of tools/bench/gpu.sh runs without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.kernel_table import BEGIN, END, section

PROGRAM = Path(__file__).parents[3] / "tools" / "bench" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(["bash", str(PROGRAM), *arguments], env=env, capture_output=True, text=True)


def test_the_table_is_written(tmp_path):
    target = tmp_path / "doc.md"
    target.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    done = run("--results", str(tmp_path / "results"), "--into", str(target), "table")
    assert done.returncode == 0, done.stderr
    assert target.read_text(encoding="utf-8") == f"{BEGIN}\n{section([])}\n{END}\n"


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    done = run("--results", str(tmp_path), "--into", str(tmp_path / "none.md"), "table", "table")
    assert done.returncode == 1
    assert done.stdout.count("== table took") == 2
    assert "expected a document with one line" in done.stderr
    assert "error: failed: table table" in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["--wheels"], ["--nccl"], ["--unknown", "1"]])
def test_wrong_arguments(arguments):
    done = run(*arguments)
    assert done.returncode == 64
    assert "error: " in done.stderr


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert "--wheels" in done.stdout
    assert "--nccl" in done.stdout


def test_an_nccl_that_is_not_there(tmp_path):
    done = run("--results", str(tmp_path), "--nccl", str(tmp_path / "libnccl.so.2"), "ranks")
    assert done.returncode == 1
    assert "libnccl.so.2: no such file" in done.stderr

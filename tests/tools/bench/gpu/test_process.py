"""Commands with a time limit: how they end, and that nothing of them is left."""

import sys
import time
from pathlib import Path

import pytest

from tools.bench.gpu import process


def run(tmp_path, code: str, limit_s: float = 60.0, **environment: str) -> process.Ended:
    return process.run([sys.executable, "-c", code], environment, limit_s, tmp_path / "logs" / "a.log")


def test_a_command_that_ends_well(tmp_path, capfd):
    ended = run(tmp_path, "import os; print('value', os.environ['GIVEN'])", GIVEN="7")
    assert (ended.problem, ended.output) == ("", "value 7\n")
    assert (tmp_path / "logs" / "a.log").read_text() == "value 7\n"
    assert "value 7\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("1 / 0", "exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),  # as the kernel does when memory is short
        ("import os; os.abort()", "ended by SIGABRT"),
    ],
)
def test_a_command_that_fails(tmp_path, code, problem):
    ended = run(tmp_path, code)
    assert ended.problem == problem


def test_a_command_that_hangs_shows_its_stacks_and_is_ended_with_all_it_started(tmp_path):
    """Also a process in a session of its own, which no signal to a group would reach, and that ignores SIGABRT."""
    child = (
        "import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN); print('ready', flush=True); time.sleep(99)"
    )
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print("pid", child.pid, flush=True)
def stuck():
    time.sleep(99)
stuck()
"""
    started = time.monotonic()
    ended = run(tmp_path, code, limit_s=8)
    assert ended.problem == "stopped at its limit of 8 s"
    assert time.monotonic() - started < 40
    assert "in stuck" in ended.output
    pid = int(ended.output.split("pid ")[1].split()[0])
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_a_command_leaves_behind_is_ended_as_well(tmp_path):
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); print('done')"
    )
    ended = run(tmp_path, code)
    assert ended.problem == ""
    assert ended.seconds < 30

"""Runs a command with a time limit, shows and keeps what it prints, and leaves none of its processes behind.

Every process it starts inherits a mark in its environment, by which all are found, those in sessions of their own as
well (torchrun's ranks). At the limit they get SIGABRT, on which Python prints its stacks, and then SIGKILL.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "TRIAXIS_GPU_STAGE"
POLL_S, GRACE_S = 0.05, 3.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: `problem` is empty if its exit code was 0."""

    problem: str
    seconds: float
    output: str


def run(command: Sequence[str], environment: Mapping[str, str], limit_s: float, log: Path) -> Ended:
    """Run the command; its output goes to this one's and to the file `log`."""
    mark, started = uuid.uuid4().hex, time.monotonic()
    settings = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", MARK: mark}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output, log.open(encoding="utf-8", errors="replace") as shown:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            while process.poll() is None and not late:
                _show(shown.read())
                time.sleep(POLL_S)
                late = time.monotonic() - started > limit_s
        finally:
            _end_all(mark, process)
            _show(shown.read())
    problem = f"stopped at its limit of {limit_s:.0f} s" if late else _problem(process.returncode)
    return Ended(problem, time.monotonic() - started, log.read_text(encoding="utf-8", errors="replace"))


def _problem(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else ""


def _show(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _end_all(mark: str, process: "subprocess.Popen[bytes]") -> None:
    for number, grace in ((signal.SIGABRT, GRACE_S), (signal.SIGKILL, GRACE_S)):
        for pid in marked(mark):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + grace
        while any(True for _ in marked(mark)) and time.monotonic() < deadline:
            process.poll()  # so that it is no zombie
            time.sleep(POLL_S)
    with suppress(subprocess.TimeoutExpired):  # a process that waits in a driver cannot be ended
        process.wait(GRACE_S)


def marked(mark: str) -> Iterator[int]:
    """Yield the living processes that have this mark."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)

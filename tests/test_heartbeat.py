"""Heartbeat: lines in a file, a bar on a terminal, silence from all ranks but one."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from engine.heartbeat import Heartbeat, Position

SOON = {"first_s": 0.05, "interval_s": 0.05, "tick_s": 0.01}


def wait_until(condition: Callable[[], bool]) -> None:
    """A sign of life is late on a busy machine; a missing one fails the test."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def file(tmp_path) -> Iterator[TextIO]:
    with (tmp_path / "stderr").open("w", encoding="utf-8") as opened:
        yield opened


def lines(file: TextIO) -> list[str]:
    return Path(file.name).read_text(encoding="utf-8").splitlines()


def test_lines_say_what_is_being_done_as_long_as_it_lasts(file):
    with closing(Heartbeat("opening data", file=file, **SOON)) as heartbeat:
        wait_until(lambda: len(lines(file)) >= 2)
        heartbeat.phase = "loading weights"
        wait_until(lambda: "weights" in lines(file)[-1])
        heartbeat.follow(lambda: Position("step 3, evaluating", 2, 40))
        wait_until(lambda: "step 3" in lines(file)[-1])
    said = lines(file)
    assert re.fullmatch(r"running     \d:\d\d  opening data", said[0])
    assert re.fullmatch(r"running     \d:\d\d  2/40 steps, ETA unknown: step 3, evaluating", said[-1])
    time.sleep(0.1)
    assert lines(file) == said  # closed


def test_whoever_speaks_in_time_gets_no_lines(file, capsys):
    with closing(Heartbeat("working", file=file, first_s=0.5, interval_s=3600, tick_s=0.01)) as heartbeat:
        heartbeat.say("a message")  # a rank that is not scheduled for 0.5 s has a line before it
        spoken = len(lines(file))
        time.sleep(0.7)
    assert len(lines(file)) == spoken
    assert capsys.readouterr().out == "a message\n"


def test_the_first_line_comes_within_ten_seconds_and_the_next_within_thirty(file):
    """The defaults, by the clock of the code: a look at the run at any time from then on finds a line due."""
    from engine import heartbeat

    assert heartbeat.FIRST_S + heartbeat.TICK_S < 10
    assert heartbeat.INTERVAL_S <= 30


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_speaks(file, monkeypatch, rank, speaks):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with closing(Heartbeat("working", file=file, **SOON)):
        if speaks:
            wait_until(lambda: bool(lines(file)))
        else:
            time.sleep(0.2)
            assert lines(file) == []


def test_a_fork_neither_speaks_nor_waits(file):
    """A data worker or a check in a child inherits the object, whatever its thread was doing."""
    with closing(Heartbeat("working", file=file, first_s=3600, tick_s=1e-4)) as heartbeat:
        for _ in range(50):
            if (pid := os.fork()) == 0:
                heartbeat.close()
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert lines(file) == []


def test_a_reader_that_is_gone_does_not_end_the_run():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file, closing(Heartbeat("working", file=file, **SOON)) as heartbeat:
        due = heartbeat._due
        wait_until(lambda: heartbeat._due > due + 0.1)  # it has tried twice
        assert heartbeat._thread.is_alive()


class Terminal:
    """A terminal of 80 columns, and what has been written to it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.set_blocking(self._master, False)
        self.file, self._written = os.fdopen(slave, "w"), ""

    @property
    def screen(self) -> list[str]:
        try:
            while part := os.read(self._master, 1 << 16):
                self._written += part.decode()
        except BlockingIOError:
            pass
        rows, column = [""], 0
        for token in re.findall(r"\x1b\[2K|[^\x1b]", self._written):
            if token == "\n":
                rows.append("")
            elif token == "\x1b[2K":
                rows[-1] = ""
            elif token == "\r":
                column = 0
            else:
                rows[-1] = rows[-1][:column] + token + rows[-1][column + 1 :]
                column += 1
        return rows


@contextmanager
def on(terminal: Terminal) -> Iterator[None]:
    """Let `print` write to the terminal as well."""
    before, sys.stdout = sys.stdout, terminal.file
    try:
        yield
    finally:
        sys.stdout = before


def test_a_terminal_has_a_bar_below_the_messages(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, step = Terminal(), 0
    with on(terminal), closing(Heartbeat("importing", file=terminal.file, tick_s=0.01, first_s=3600)) as heartbeat:
        heartbeat.say("a first message")
        assert terminal.screen == ["a first message", ""]  # no bar before there is something to count
        heartbeat.follow(lambda: Position("step 60, training, " + "at length " * 20, step, 120))
        wait_until(lambda: "  0.0% ────────────" in terminal.screen[-1])
        step = 60
        wait_until(lambda: " 50.0% ━━━━━━──────" in terminal.screen[-1])
        heartbeat.say("a second message,\nof two lines")
        *above, bar = terminal.screen
        assert above == ["a first message", "a second message,", "of two lines"]
        assert "60/120 steps, ETA " in bar and len(bar) == 79
    assert terminal.screen == ["a first message", "a second message,", "of two lines", ""]


def test_the_time_left_is_that_of_the_steps_after_the_first(file):
    heartbeat, step = Heartbeat("", active=False, file=file), 10
    heartbeat.follow(lambda: Position("training", step, 110))
    for now, noted, left in [(0, 10, "unknown"), (50, 11, "unknown"), (55, 11, "unknown"), (60, 16, "3:08")]:
        heartbeat._pace.note(noted, now)
        assert f"ETA {left}: training" in heartbeat._position()

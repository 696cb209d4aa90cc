"""ProgressDisplay: lines where output is piped, a bar on a terminal."""

import io
import sys
from contextlib import closing

import pytest

from engine.cli.progress import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_when_it_is_time(capsys):
    progress = ProgressDisplay(200, interval_s=5)
    progress.update(10, "soon")
    assert capsys.readouterr().err == ""
    progress._shown_at -= 6
    progress._start -= 100
    progress.update(50, "5 MB/s")
    progress.update(60, "soon again")
    progress.update(100, "forced", due=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [" 25.0%  5 MB/s  ETA 5:00", " 50.0%  forced  ETA 1:40"]


def test_what_was_done_before_says_nothing_about_the_speed(capsys):
    with closing(ProgressDisplay(10, done=6, file=sys.stdout)) as progress:
        progress._start -= 10
        progress.update(6, "nothing yet", due=True)
        progress.update(8, "two", due=True)
    assert capsys.readouterr().out.splitlines() == [" 60.0%  nothing yet  ETA unknown", " 80.0%  two  ETA 0:10"]


def test_nothing_to_do_is_no_division_by_zero(capsys):
    ProgressDisplay(0).update(0, "done", due=True)
    assert capsys.readouterr().err == "  0.0%  done  ETA unknown\n"


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    file = Terminal()
    with closing(ProgressDisplay(200, file=file)) as progress:
        progress._shown_at -= 10
        progress.update(100, "[half] " + "and much more to say than fits on a narrow terminal" * 2)
        progress.update(101, "too soon")
    out = file.getvalue()
    assert " 50.0%  ETA 0:0" in out if term == "xterm" else "  ETA 0:0" in out
    assert "[half] and much" in out and "too soon" not in out
    assert ("\x1b[?25h" in out) == ("━" in out) == (term == "xterm")  # the cursor is back

"""Signs of life of a run: a line after half a minute of silence or, on a terminal, a bar that moves.

A thread of rank 0 looks twice a second at what the run is doing; the training loop does nothing for it. The thread
writes to the file descriptor, so that data workers, which are forked meanwhile, inherit no lock of a stream.
Alternative considered: rich's live display, as of `engine/cli/progress.py`; it hides the cursor, which stays hidden if
torchrun kills the rank, and has locks of its own.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TextIO

from engine.formatting import duration

FIRST_S = 7.0  # seconds of silence before the first line
INTERVAL_S = 30.0  # and before each further one
TICK_S = 0.5
_BAR = 12  # characters
_CLEAR = "\r\x1b[2K"


class Position(NamedTuple):
    """Where a training loop is: what it is doing, and how many of its steps are done."""

    text: str
    step: int
    total: int


class Heartbeat:
    """The thread that gives signs of life on stderr, until `close`. Messages on stdout go through `say`.

    Args:
        phase: what the process is doing; update the attribute where a phase begins.
        active: whether this process gives signs; by default if it is torchrun's rank 0, or no rank.
        file: by default stderr; a bar if it is a terminal.
        first_s: seconds of silence before the first line.
        interval_s: seconds of silence before each further line.
        tick_s: seconds between two looks at the run.
    """

    def __init__(
        self,
        phase: str,
        *,
        active: bool | None = None,
        file: TextIO | None = None,
        first_s: float = FIRST_S,
        interval_s: float = INTERVAL_S,
        tick_s: float = TICK_S,
    ) -> None:
        self.phase = phase
        self._file, self._interval_s, self._tick_s = file or sys.stderr, interval_s, tick_s
        self._started = time.monotonic()
        self._due = self._started + first_s
        self._progress: Callable[[], Position] | None = None
        self._pace = _Pace()
        self._has_bar = False  # on the screen
        self._lock = threading.Lock()  # of the screen
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if os.environ.get("RANK", "0") == "0" if active is None else active:
            self._thread.start()

    def follow(self, progress: Callable[[], Position]) -> None:
        """Show the progress of a training loop from now on. Another thread calls `progress`."""
        self._progress = progress

    def say(self, text: str) -> None:
        """Print a line on stdout, above the bar."""
        with self._lock:
            self._remove_bar()
            print(text, flush=True)
            self._due = time.monotonic() + self._interval_s
            if self._shows_bar():
                self._draw()

    def close(self) -> None:
        """End the thread and remove the bar. A no-op in a fork, which has no such thread."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            self._remove_bar()

    def _run(self) -> None:
        while not self._ended.wait(self._tick_s):
            with self._lock:
                now = time.monotonic()
                if self._progress is not None:
                    self._pace.note(self._progress().step, now)
                if self._shows_bar():
                    self._draw()
                elif now + self._tick_s > self._due:
                    self._write(f"{'running':12}{duration(now - self._started)}  {self._position()}\n")
                    self._due = now + self._interval_s

    def _shows_bar(self) -> bool:
        running = self._progress is not None and self._thread.is_alive() and not self._ended.is_set()
        return running and self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def _position(self) -> str:
        if self._progress is None:
            return self.phase
        text, step, total = self._progress()
        return f"{step}/{total} steps, ETA {self._pace.left(total)}: {text}"

    def _draw(self) -> None:
        """Draw the bar over the last one. The cursor stays at its beginning, where other processes may write."""
        assert self._progress is not None
        _, step, total = self._progress()
        done = _BAR * step // max(total, 1)
        bar = f" {step / max(total, 1):6.1%} {'━' * done}{'─' * (_BAR - done)} {self._position()}"
        with suppress(OSError):
            columns = os.get_terminal_size(self._file.fileno()).columns or 80
            self._write(f"{_CLEAR}{bar[: columns - 1]}\r")
            self._has_bar = True

    def _remove_bar(self) -> None:
        if self._has_bar:
            self._write(_CLEAR)
            self._has_bar = False

    def _write(self, text: str) -> None:
        with suppress(OSError):  # nobody reads any more, which the next message will report
            os.write(self._file.fileno(), text.encode(self._file.encoding or "utf-8", "replace"))


class _Pace:
    """The time left, by the steps after the first one, which takes longer."""

    def __init__(self) -> None:
        self._noted: list[tuple[float, int]] = []  # (time, step): at the start, after the first step, the last one

    def note(self, step: int, now: float) -> None:
        if not self._noted or step > self._noted[-1][1]:
            self._noted = [*self._noted[:2], (now, step)]

    def left(self, total: int) -> str:
        if len(self._noted) < 3:
            return "unknown"
        (begin, first), (end, last) = self._noted[1:]
        return duration((end - begin) / (last - first) * (total - last))

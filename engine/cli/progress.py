"""Progress display: a bar on a terminal, or a line every few seconds in a file or a pipe.

Both show the completed percentage, a text of the program, and the time left. The bar is redrawn in `update`, not by a
thread, because worker processes may be forked meanwhile.
"""

import sys
import time
from typing import TYPE_CHECKING, TextIO

from engine.formatting import duration

if TYPE_CHECKING:
    from rich.progress import Progress

_REDRAW_S = 0.1  # minimum time between redraws of the bar


class ProgressDisplay:
    """Progress towards `total`, in any unit. Close it to remove the bar (`contextlib.closing`).

    Args:
        done: the part done by an earlier run, excluded from the speed.
        file: output stream; by default stderr.
        interval_s: seconds between lines.
    """

    def __init__(self, total: float, *, done: float = 0, file: TextIO | None = None, interval_s: float = 5.0) -> None:
        self._total, self._before = max(total, 1), done
        self._interval_s = interval_s
        self._file = file or sys.stderr
        self._start = self._shown_at = time.monotonic()
        self._bar = _terminal_bar(self._file)

    @property
    def seconds(self) -> float:
        """Seconds since the start; never 0."""
        return max(time.monotonic() - self._start, 1e-9)

    def update(self, done: float, text: str, *, due: bool | None = None) -> None:
        """Show that `done` of the total is done, and `text`; rate-limited by default.

        Args:
            due: whether to print a line now; None: decide by time, as the bar always does.
        """
        passed = time.monotonic() - self._shown_at
        if self._bar is not None:
            due = passed >= _REDRAW_S
        elif due is None:
            due = passed >= self._interval_s
        if not due:
            return
        self._shown_at = time.monotonic()
        new = done - self._before
        left = duration(self.seconds / new * (self._total - done)) if new > 0 else "unknown"
        if self._bar is None:
            print(f"{done / self._total:6.1%}  {text}  ETA {left}", file=self._file, flush=True)
        else:  # on a narrow terminal only the text is shortened
            self._draw(self._bar, done, f"{done / self._total:6.1%}  ETA {left}", text)

    def _draw(self, bar: "Progress", done: float, share: str, text: str) -> None:
        if not bar.tasks:
            bar.add_task(share, total=self._total, text=text)
            bar.start()
        bar.update(bar.tasks[0].id, completed=done, description=share, text=text, refresh=True)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()


def _terminal_bar(file: TextIO) -> "Progress | None":
    """Return the bar for a terminal, or None for a file, a pipe or a terminal without cursor movement."""
    if not file.isatty():
        return None
    from rich import progress  # takes 30 ms to import
    from rich.console import Console
    from rich.table import Column

    console = Console(file=file)
    if console.is_dumb_terminal:
        return None
    share, text = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=share),
        progress.BarColumn(bar_width=12),
        progress.TextColumn("{task.fields[text]}", markup=False, table_column=text),
        console=console,
        auto_refresh=False,
        expand=True,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # printed lines go above the bar, but stay out of the terminal
        redirect_stderr=sys.stderr.isatty(),  # where the stream is a file
    )

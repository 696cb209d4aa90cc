"""Where records of a run go: destinations that can neither end training nor hold it up."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

QUEUED = 1000  # records; more than this are dropped
DRAIN_S = 10.0  # seconds that the end of the run waits for the rest


class Sink:
    """A file or a service that takes records in a thread of its own, in order, from a bounded queue.

    What fails is said once, with its reason, and its record is dropped; `close` says how many were.

    Args:
        name: for messages.
        say: prints a message; called by any thread.
    """

    def __init__(
        self, name: str, say: Callable[[str], None], *, queued: int = QUEUED, drain_s: float = DRAIN_S
    ) -> None:
        self.name, self._say, self._drain_s = name, say, drain_s
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(queued)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._given = self._written = 0
        self._has_failed = False

    def put(self, write: Callable[[], None]) -> None:
        """Have `write` called soon. Never waits, never raises."""
        if not self._thread.ident:
            self._thread.start()
        self._given += 1
        try:
            self._queue.put_nowait(write)
        except queue.Full:
            self._fail(f"does not answer; {self._queue.maxsize} records wait for it, and further ones are dropped")

    def close(self, end: Callable[[], None] | None = None) -> None:
        """Write what is queued, then call `end`, and say how much was lost. Waits for `drain_s` at most."""
        if end is not None:
            self.put(end)
        if not self._thread.ident:
            return
        until = time.monotonic() + self._drain_s
        with suppress(queue.Full):
            self._queue.put(None, timeout=self._drain_s)
        self._thread.join(until - time.monotonic())
        if lost := self._given - self._written:
            self._say(f"warning     {self.name}: {lost:,} of {self._given:,} records lost")

    def _run(self) -> None:
        while (write := self._queue.get()) is not None:
            try:
                write()
                self._written += 1
            except Exception as error:
                self._fail(f"cannot be written ({error or type(error).__name__})")

    def _fail(self, what: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._say(f"warning     {self.name} {what}; training goes on")

"""What this rank is doing: its phase, since when, and how long that may take, in memory shared with its watchdog.

A process that is stopped, or whose interpreter lock is held, cannot answer, so the rank notes what it does on a page of
memory that its watchdog process (`engine/train/guard.py`) reads. A note costs about a microsecond. Alternative
considered: heartbeats sent by a thread of the rank, which go on while the training loop hangs.
"""

import math
import mmap
import struct
import time
from dataclasses import dataclass
from typing import NamedTuple

MIN_LIMIT_S = 300.0  # of a phase under "auto": a recompilation in mid-run takes minutes
MIN_STORAGE_LIMIT_S = 600.0  # of a phase that waits for storage, which may pause for minutes
STORAGE_PHASES = (
    *("reading data", "waiting for the data of all ranks", "evaluating", "saving a checkpoint"),
    "running a hook",  # of a user, which may do anything
)
FACTOR = 10.0  # "auto": times the longest one so far
MIN_FACTOR = 2.0  # the same, where `most` is less

_NOTE = struct.Struct("<QddI")  # notes so far, begun, limit in seconds, bytes of the text
_TEXT, _ALIVE, _ORDER, _LENGTH = struct.Struct("<400s"), struct.Struct("<d"), struct.Struct("<q"), struct.Struct("<I")
_AT_TEXT, _AT_ALIVE, _AT_ORDER = 64, 512, 520
_AT_SAMPLE, _AT_FAILURE, _AT_CAUSE, _SIZE = 1024, 8192, 12288, 16384  # texts, up to the next one


class Note(NamedTuple):
    """What a rank is doing.

    Attributes:
        number: notes so far.
        begun: by `time.monotonic`, which all processes of a host share.
        limit_s: how long it may take.
        text: phase and pipeline action.
    """

    number: int
    begun: float
    limit_s: float
    text: str


@dataclass(frozen=True)
class Limits:
    """How long a phase may take, in seconds: `fixed`, or learned from the longest so far, up to `most`.

    What was never seen to end has no limit of its own: a first save or evaluation may take hours. Ranks that wait for
    it in a communication end by the timeout of that.
    """

    fixed: float | None = None
    most: float = 1800.0

    def of(self, kind: str, longest: float | None) -> float:
        """The limit of phases of this `kind`; `longest` is None before the first one was completed."""
        if self.fixed is not None:
            return self.fixed
        if longest is None:
            return math.inf
        least = MIN_STORAGE_LIMIT_S if kind in STORAGE_PHASES else MIN_LIMIT_S
        return max(least, MIN_FACTOR * longest, min(self.most, FACTOR * longest))


class Activity:
    """The page. The rank notes phases and pipeline actions; the watchdog reads them, and writes what it decides.

    Attributes:
        phase: such as "step 3, reading data"; the word behind the first comma tells which phases are alike.
        action: of the pipeline, such as "pipeline stage 0, F2"; empty outside of schedules.
        limits: how long phases may take.
        is_warm: whether a step is complete; until then phases may take any time.
    """

    def __init__(self) -> None:
        self.is_warm = False
        self.limits = Limits()
        self._page = mmap.mmap(-1, _SIZE)
        self._longest: dict[str, float] = {}
        self._number, self._begun, self._kind = 0, time.monotonic(), ""
        self._phase, self._action = "starting", ""
        self._begin("starting")

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, text: str) -> None:
        self._phase, self._action = text, ""
        self._begin(_kind(text))

    @property
    def action(self) -> str:
        return self._action

    def act(self, text: str, kind: str) -> None:
        """Note an action of the pipeline within the phase; empty: back to the phase itself."""
        self._action = text
        self._begin(f"{_kind(self._phase)} {kind}" if text else _kind(self._phase))

    @property
    def position(self) -> str:
        """Phase and pipeline action, for people."""
        return f"{self._phase}, {self._action}" if self._action else self._phase

    def _begin(self, kind: str) -> None:
        now = time.monotonic()
        if self.is_warm:
            took = now - self._begun
            if took > self._longest.get(self._kind, -1.0):
                self._longest[self._kind] = took
        limit = self.limits.of(kind, self._longest.get(kind)) if self.is_warm else math.inf
        self._number, self._begun, self._kind = self._number + 1, now, kind
        text = self.position.encode()[: _TEXT.size]
        self._page[_AT_TEXT : _AT_TEXT + len(text)] = text
        _NOTE.pack_into(self._page, 0, self._number, now, limit, len(text))

    def note(self) -> Note:
        """Read the current note; for other threads and the watchdog."""
        while True:
            head = _NOTE.unpack_from(self._page, 0)
            text = self._page[_AT_TEXT : _AT_TEXT + head[3]]
            if _NOTE.unpack_from(self._page, 0) == head:
                return Note(head[0], head[1], head[2], text.decode(errors="replace"))

    @property
    def alive(self) -> float:
        """When a thread of the rank last ran, by `time.monotonic`."""
        return float(_ALIVE.unpack_from(self._page, _AT_ALIVE)[0])

    @alive.setter
    def alive(self, now: float) -> None:
        _ALIVE.pack_into(self._page, _AT_ALIVE, now)

    @property
    def order(self) -> int:
        """The exit code with which the watchdog tells the rank to end, or 0."""
        return int(_ORDER.unpack_from(self._page, _AT_ORDER)[0])

    @order.setter
    def order(self, code: int) -> None:
        _ORDER.pack_into(self._page, _AT_ORDER, code)

    @property
    def sample(self) -> str:
        """Where the rank's threads are and how many collectives it has begun, as JSON; written while it is idle."""
        return self._read(_AT_SAMPLE)

    @sample.setter
    def sample(self, text: str) -> None:
        self._write(_AT_SAMPLE, text, _AT_FAILURE)

    @property
    def failure(self) -> str:
        """Why the rank leaves: what it reports, "-" if it leaves as agreed with all ranks; empty while it runs."""
        return self._read(_AT_FAILURE)

    @failure.setter
    def failure(self, text: str) -> None:
        self._write(_AT_FAILURE, text, _AT_CAUSE)

    @property
    def cause(self) -> str:
        """Which rank ended the run and why, as the watchdog has heard; empty while all run."""
        return self._read(_AT_CAUSE)

    @cause.setter
    def cause(self, text: str) -> None:
        self._write(_AT_CAUSE, text, _SIZE)

    def _read(self, at: int) -> str:
        (length,) = _LENGTH.unpack_from(self._page, at)
        start = at + _LENGTH.size
        return self._page[start : start + length].decode(errors="replace")

    def _write(self, at: int, text: str, end: int) -> None:
        start = at + _LENGTH.size
        data = text.encode()[: end - start]
        _LENGTH.pack_into(self._page, at, 0)
        self._page[start : start + len(data)] = data
        _LENGTH.pack_into(self._page, at, len(data))


def _kind(phase: str) -> str:
    """`phase` without its step: "step 3, evaluating, batch 1 of 2" is "evaluating"."""
    return phase.split(", ", 2)[1] if ", " in phase else phase

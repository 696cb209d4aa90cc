"""The process beside a rank that notices its hang or death, tells the guards of all ranks, and ends the rank.

Forked before the rank connects anything but the control group, it shares the rank's page of notes and talks to the
other guards over the store. It imports nothing and takes no lock of the rank. What it does:

- a phase takes longer than its limit: the guards of all ranks have the stacks written (Python's fault handler, which
  needs no interpreter lock), exchange what their ranks were doing, name the late one, and end all with code 70;
- a rank ends alone: the others are told, and end with code 69 after a moment in which they may do so themselves;
- a second signal: the rank ends at once, whatever it is blocked in.
"""

import gc
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from torch.distributed.distributed_c10d import Store

from engine.errors import HangError, Interrupted, PeerError, TriaxisError, report_rank
from engine.parallel.activity import Activity
from engine.parallel.connect import clone
from engine.train.late import RankReport, describe_hang
from engine.train.signals import STOP_SIGNALS

STACKS_SIGNAL = signal.SIGRTMIN + 6 if sys.platform == "linux" else signal.SIGUSR2
SECOND_S = 0.5  # a signal later than this after the first one is a second one; schedulers and torchrun both send it
_TICK_S = 0.2
_GRACE_S = 3.0  # in which a rank that lost a peer may end by itself
_COLLECT_S = 0.8  # for the reports of all ranks
_SILENT_S = 1.5  # without a turn of the rank's thread: an interpreter lock is held
_LAST_S = 0.5  # from the order to end until the rank is killed
_HANG = "a hang"
_ALARM, _VERDICT = "alarm", "verdict"


@dataclass(frozen=True)
class Seat:
    """The rank that a guard watches, and its process."""

    rank: int
    world_size: int
    host: str
    run_dir: Path
    pid: int


class Guard:
    """Watches one rank until it leaves; runs in a process of its own.

    Args:
        line: on which the rank's signals come, and which ends with the rank.
        stacks: file descriptor to which the rank writes its stacks on `STACKS_SIGNAL`.
    """

    def __init__(self, seat: Seat, activity: Activity, store: Store | None, line: socket, stacks: int) -> None:
        self.seat, self.activity, self.line, self.stacks = seat, activity, line, stacks
        gc.disable()  # the rank's objects are not this process's to collect
        os.setsid()  # what ends the rank's group of processes leaves this one
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._close_files()
        self.store = None if store is None else clone(store)
        self._alarm: dict[str, str | int] = {}
        self._first_signal = 0.0
        if store is not None:
            threading.Thread(target=self._listen, args=[clone(store)], daemon=True).start()

    def run(self) -> None:
        """Return when the rank has ended or left."""
        while True:
            ready = select.select([self.line], [], [], _TICK_S)[0]
            if ready and not self._heard_signals():
                return self._rank_ended()
            if self._alarm:
                return self._answer()
            note = self.activity.note()
            if time.monotonic() - note.begun > note.limit_s and not self.activity.failure:
                self._raise("hang", f"{note.limit_s}")

    def _close_files(self) -> None:
        """Close the rank's connections, which would stay open after its death."""
        keep = {0, 1, 2, self.line.fileno(), self.stacks}
        for number in {int(name) for name in os.listdir("/proc/self/fd")} - keep:
            with suppress(OSError):
                os.close(number)
        self.stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # PyTorch warns of a store that has gone

    def _heard_signals(self) -> bool:
        """Note the rank's signals, and end it on a second one; False at its end."""
        numbers = self.line.recv(64)
        now = time.monotonic()
        for number in set(numbers) & set(STOP_SIGNALS):
            if not self._first_signal:
                self._first_signal = now
            elif now - self._first_signal > SECOND_S:
                ended = f"{self._place()}: ended by a second {signal.Signals(number).name}, without saving"
                report_rank(Interrupted(ended), self.stderr, code=128 + number)
                self.activity.failure = ended
                self._end_rank(128 + number)
                break
        return bool(numbers)

    def _rank_ended(self) -> None:
        failure = self.activity.failure
        if failure == "-":
            return
        if not failure:
            others = [str(rank) for rank in range(self.seat.world_size) if rank != self.seat.rank]
            along = f"; with it end: rank(s) {', '.join(others[:8])}{' ...' * (len(others) > 8)}" if others else ""
            failure = f"{self._place()}: killed, often for lack of memory, or ended by a crash{along}"
            place, by_torchrun = self._place(), "TORCHELASTIC_ERROR_FILE" in os.environ
            self._record("killed", rank=self.seat.rank, place=place, along=along)
            report_rank(TriaxisError(failure), self.stderr, code=0, silent=by_torchrun)
        self._raise("ended", failure)

    def _place(self) -> str:
        return f"rank {self.seat.rank} ({self.seat.host}), {self.activity.note().text}"

    def _raise(self, kind: str, text: str) -> None:
        """Tell all guards; the first alarm counts."""
        alarm: dict[str, str | int] = {"kind": kind, "rank": self.seat.rank, "host": self.seat.host, "text": text}
        if self.store is None:
            self._alarm = alarm
            return
        with suppress(RuntimeError):  # the store has ended with the rank or torchrun that served it
            if self.store.add("alarms", 1) == 1:
                self.store.set(_ALARM, json.dumps(alarm))
            return
        self._alarm = alarm

    def _listen(self, store: Store) -> None:
        """Wait for an alarm, on a connection of its own."""
        while True:
            try:
                store.wait([_ALARM])
                self._alarm = json.loads(store.get(_ALARM))
                return
            except RuntimeError as error:
                if "timeout" in str(error).lower():
                    continue
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    time.sleep(0.5)  # for a rank 0 that leaves, as this one does
                    text = "rank 0, which serves the store, has ended"
                    self._alarm = {"kind": "ended", "rank": 0, "host": self.seat.host, "text": text}
                return

    def _answer(self) -> None:
        rank, text = self._alarm["rank"], str(self._alarm["text"])
        if self._alarm["kind"] == "hang":
            return self._answer_hang(float(text))
        if rank == self.seat.rank:
            return None
        self.activity.cause = text
        if self._ends_within(_GRACE_S):
            return None
        if self._alarm["host"] != self.seat.host and os.environ.get("LOCAL_RANK", "0") == "0":
            report_rank(PeerError(f"this node ends with another one: {text}"), self.stderr, code=PeerError.exit_code)
        self._end_rank(PeerError.exit_code)

    def _answer_hang(self, limit_s: float) -> None:
        self.activity.cause = _HANG
        own = self._report()
        os.kill(self.seat.pid, STACKS_SIGNAL)
        if own.stopped:
            os.kill(self.seat.pid, signal.SIGCONT)
        leads = self._alarm["rank"] == self.seat.rank
        verdict = self._agree(own, limit_s, leads)
        self._write_stacks(own, verdict)
        error = HangError(f"{verdict}. Stacks: {self.seat.run_dir / 'hangs'}")
        self.activity.failure = str(error)
        report_rank(error, self.stderr, code=HangError.exit_code, silent=not leads)
        if self.seat.rank == 0:
            self._record("exit", code=HangError.exit_code, reason=str(error), advice=HangError.advice)
        self._end_rank(HangError.exit_code)

    def _agree(self, own: RankReport, limit_s: float, leads: bool) -> str:
        """Exchange the reports of all ranks; return the verdict of the guard that raised the alarm."""
        reports, store, size = {own.rank: own}, self.store, self.seat.world_size
        if store is None:
            return describe_hang(reports, 1, limit_s)
        until = time.monotonic() + _COLLECT_S
        with suppress(RuntimeError):
            store.set(f"report/{own.rank}", own.to_json())
            while time.monotonic() < until + (0.0 if leads else _COLLECT_S):
                if not leads and store.check([_VERDICT]):
                    return store.get(_VERDICT).decode()
                for rank in set(range(size)) - set(reports) if leads else ():
                    if store.check([key := f"report/{rank}"]):
                        reports[rank] = RankReport.from_json(store.get(key).decode())
                if len(reports) == size:
                    break
                time.sleep(0.02)
        verdict = describe_hang(reports, size, limit_s)
        if leads:
            with suppress(RuntimeError):
                store.set(_VERDICT, verdict)
        return verdict

    def _report(self) -> RankReport:
        """What the rank is doing; waits a moment for what its thread says of it."""
        pid, until = self.seat.pid, time.monotonic() + 2.5 * _TICK_S
        stopped, note = _state(pid) == "T", self.activity.note()
        silent = not stopped and time.monotonic() - self.activity.alive > _SILENT_S
        sample = self._sample()
        while sample.get("number") != note.number and not (stopped or silent) and time.monotonic() < until:
            time.sleep(0.02)
            sample, note = self._sample(), self.activity.note()
        known = {key: sample[key] for key in ("waits", "peers", "calls", "where") if key in sample}
        children = tuple(child for child in _children(pid) if _state(child) == "T")
        idle = time.monotonic() - note.begun
        at = (self.seat.rank, self.seat.host, note.text, note.number, idle, stopped, silent, children)
        return RankReport(*at, **known)

    def _sample(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.activity.sample)
        except ValueError:  # none yet, or it is being written
            found = {}
        return found

    def _write_stacks(self, own: RankReport, verdict: str) -> None:
        """Write the rank's stacks to `hangs/rank_N.txt` in the run's directory."""
        text = b""
        for _ in range(10):
            if text := os.pread(self.stacks, 1 << 20, 0):
                break
            time.sleep(0.02)
        with suppress(OSError):
            directory = self.seat.run_dir / "hangs"
            directory.mkdir(parents=True, exist_ok=True)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            head = f"{now} rank {own.rank} ({own.host}), {own.text}\n{verdict}\n\n".encode()
            (directory / f"rank_{self.seat.rank}.txt").write_bytes(head + text)

    def _record(self, event: str, **fields: object) -> None:
        """Append to the run's events what the rank itself cannot."""
        with suppress(OSError), (self.seat.run_dir / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")

    def _end_rank(self, code: int) -> None:
        """Let the rank's thread end it with `code`; kill it if that does not happen."""
        self.activity.order = code
        with suppress(ProcessLookupError):
            os.kill(self.seat.pid, signal.SIGCONT)
            if not self._ends_within(_LAST_S):
                os.kill(self.seat.pid, signal.SIGKILL)

    def _ends_within(self, seconds: float) -> bool:
        """Whether the rank ends or leaves within `seconds`."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self.line], [], [], left)[0] and not self.line.recv(64):
                return True
        return False


def _state(pid: int) -> str:
    """The letter of a process's state in /proc: T if it is stopped; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return [child for child in found if child != os.getpid()]

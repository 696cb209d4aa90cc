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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from socket import create_connection, socket
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from engine.errors import HangError, Interrupted, PeerError, TriaxisError, report_rank
from engine.parallel.activity import Activity
from engine.parallel.connect import clone
from engine.train.late import RankReport, describe_hang
from engine.train.signals import STOP_SIGNALS

STACKS_SIGNAL = signal.SIGRTMIN + 6 if sys.platform == "linux" else signal.SIGUSR2
SECOND_S = 2.0  # a signal later than this after the first one is a second one; schedulers and torchrun both send it
_TICK_S = 0.2
_GRACE_S = 3.0  # in which a rank that lost a peer may end by itself
_COLLECT_S = 0.8  # for the reports of all ranks
_ANSWER_S = 2.0  # for the store, storage and stderr, which may be what hangs
_PAUSE_S = 5.0  # between two looks: this host, or its container, was suspended
_SILENT_S = 1.5  # without a turn of the rank's thread: an interpreter lock is held
_LAST_S = 0.5  # from the order to end until the rank is killed
_LISTEN_S = 60.0
HANG = "a hang"
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
        self._process = _open_process(seat.pid)
        self._ends = [line.fileno()] if self._process is None else [line.fileno(), self._process]  # readable at the end
        self._close_files()
        self.store = store
        self._alarm: dict[str, str | int] = {}
        self._first_signal = 0.0
        self._looked = self._resumed = time.monotonic()
        if store is not None:
            threading.Thread(target=self._listen, args=[store], daemon=True).start()

    def run(self) -> None:
        """Return when the rank has ended or left."""
        while True:
            ready = select.select(self._ends, [], [], _TICK_S)[0]
            if ready and (self._process in ready or not self._heard_signals()):
                return self._rank_ended()
            if self._alarm:
                return self._answer()
            if self._is_late() and not self.activity.failure:
                self._raise("hang", f"{self.activity.note().limit_s}")

    def _is_late(self) -> bool:
        """Whether the phase takes too long, from its beginning or the end of a suspension.

        A stopped rank is late for those that wait for it, whose guards say so. If no rank waits, a person or a
        scheduler has stopped them all, and will continue them.
        """
        now, note = time.monotonic(), self.activity.note()
        if now - self._looked > _PAUSE_S or (now - note.begun > _TICK_S and _state(self.seat.pid) == "T"):
            self._resumed = now
        self._looked = now
        return now - max(note.begun, self._resumed) > note.limit_s

    def _close_files(self) -> None:
        """Close the rank's connections, which would stay open after its death."""
        keep = {0, 1, 2, self.stacks, *self._ends}
        numbers = set(range(4096))
        with suppress(OSError):  # /proc may be hidden
            numbers = {int(name) for name in os.listdir("/proc/self/fd")}
        for number in numbers - keep:
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
                self._report_end(Interrupted(ended), code=128 + number)
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
            _within(_ANSWER_S, lambda: self._record("killed", rank=self.seat.rank, place=place, along=along))
            self._report_end(TriaxisError(failure), code=0, silent=by_torchrun)
        self._raise("ended", failure)

    def _place(self) -> str:
        return f"rank {self.seat.rank} ({self.seat.host}), {self.activity.note().text}"

    def _raise(self, kind: str, text: str) -> None:
        """Tell all guards; the first alarm counts."""
        alarm: dict[str, str | int] = {"kind": kind, "rank": self.seat.rank, "host": self.seat.host, "text": text}
        if self.store is None:
            self._alarm = alarm
            return
        told = threading.Event()

        def tell(known: Store) -> None:
            with suppress(RuntimeError):
                store = clone(known)  # an idle connection may have been cut
                if store.add("alarms", 1) == 1:
                    store.set(_ALARM, json.dumps(alarm))
                told.set()

        known = self.store
        _within(_ANSWER_S, lambda: tell(known))
        if not told.is_set():  # the store has ended, or hangs, with the rank or torchrun that serves it
            self._alarm = self._alarm or alarm

    def _listen(self, known: Store) -> None:
        """Wait for an alarm, on a connection of its own; again after a while, as some networks cut idle ones."""
        store = clone(known)
        while True:
            try:
                store.wait([_ALARM], timedelta(seconds=_LISTEN_S))
                self._alarm = json.loads(store.get(_ALARM))
                return
            except RuntimeError as error:
                if "timeout" in str(error).lower():
                    continue
                if _is_served(known):
                    store = clone(known)
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
            self._report_end(PeerError(f"this node ends with another one: {text}"), code=PeerError.exit_code)
        self._end_rank(PeerError.exit_code)

    def _answer_hang(self, limit_s: float) -> None:
        self.activity.cause = HANG
        own = self._report()
        self._signal(STACKS_SIGNAL)
        if own.stopped:
            self._signal(signal.SIGCONT)
        leads = self._alarm["rank"] == self.seat.rank
        verdict = self._agree(own, limit_s, leads)
        error = HangError(f"{verdict}. Stacks: {self.seat.run_dir / 'hangs'}")
        self.activity.failure = str(error)
        self._report_end(error, code=HangError.exit_code, silent=not leads)
        _within(_ANSWER_S, lambda: self._write_hang(own, verdict, error))
        self._end_rank(HangError.exit_code)

    def _agree(self, own: RankReport, limit_s: float, leads: bool) -> str:
        """Return the verdict of the guard that raised the alarm, or this one's if the store does not answer."""
        if self.store is None:
            return describe_hang({own.rank: own}, 1, limit_s)
        said, known = list[str](), self.store
        _within(2 * _COLLECT_S + _TICK_S, lambda: said.append(self._exchange(clone(known), own, limit_s, leads)))
        alone = (
            f"no progress for {limit_s:.3g} s: rank {own.rank} ({own.host}) in {own.waits or own.where} ({own.text})"
        )
        return said[0] if said else f"{alone}; the store does not answer, so the late rank is not known"

    def _exchange(self, store: Store, own: RankReport, limit_s: float, leads: bool) -> str:
        """Exchange the reports of all ranks."""
        reports, size = {own.rank: own}, self.seat.world_size
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

    def _write_hang(self, own: RankReport, verdict: str, error: HangError) -> None:
        """Write the rank's stacks to `hangs/rank_N.txt` in the run's directory, and the exit to its events."""
        if self.seat.rank == 0:
            self._record("exit", code=HangError.exit_code, reason=str(error), advice=HangError.advice)
        text = b""
        for _ in range(50):
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
        """Append to the run's events what the rank itself cannot, by one call, as other processes append to them."""
        line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
        with suppress(OSError), (self.seat.run_dir / "events.jsonl").open("ab", buffering=0) as events:
            events.write(line.encode())

    def _report_end(self, error: TriaxisError, *, code: int, silent: bool = False) -> None:
        _within(_ANSWER_S, lambda: report_rank(error, self.stderr, code=code, silent=silent))

    def _end_rank(self, code: int) -> None:
        """Let the rank's thread end it with `code`; kill it if that does not happen."""
        self.activity.order = code
        self._signal(signal.SIGCONT)
        if not self._ends_within(_LAST_S):
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self._process is not None:
                signal.pidfd_send_signal(self._process, number)  # never to a later process of the same number
            else:
                os.kill(self.seat.pid, number)

    def _ends_within(self, seconds: float) -> bool:
        """Whether the rank ends or leaves within `seconds`."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready = select.select(self._ends, [], [], left)[0]
            if ready and (self._process in ready or not self.line.recv(64)):
                return True
        return False


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call in a thread, and wait for it no longer than `seconds`."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def _open_process(pid: int) -> int | None:
    """A file descriptor of the process that is readable at its end; None before Linux 5.3.

    The other end of the rank's line may be open in its data workers.
    """
    with suppress(OSError):
        return os.pidfd_open(pid)
    return None


def _is_served(store: Any) -> bool:
    """Whether the server of `store` accepts connections."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    with suppress(OSError):
        if host := getattr(store, "host", None):  # a TCPStore
            create_connection((host, store.port), timeout=_ANSWER_S).close()
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

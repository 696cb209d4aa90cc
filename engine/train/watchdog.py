"""The watchdog of a rank: a process that notices hangs (`guard.py`), and a thread of the rank that answers it.

The process sees what a thread cannot: that the rank is stopped, that its interpreter lock is held, that it was killed.
The thread sees what another process cannot: in which communication the rank waits. The training loop only notes its
phases (`engine/parallel/activity.py`). Linux only; elsewhere ranks wait for `parallel.timeout_s`.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import orjson
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from engine.errors import PeerError, TriaxisError, as_triaxis_error
from engine.parallel.activity import Activity, Limits
from engine.parallel.agreement import broadcast_ints
from engine.parallel.layout import World
from engine.train.guard import HANG, STACKS_SIGNAL, Guard, Seat

_TICK_S = 0.2
_HEARD_S = 1.0  # in which the watchdog hears of the rank that ended the connection
_HANG_S = 10.0  # in which the guard ends a rank after a hang
_COMMUNICATES = {  # functions that wait for other ranks; None: all of the module
    "engine.parallel.collectives": None,
    "engine.parallel.agreement": None,
    "engine.parallel.layout": ("sum_on_device",),
    "engine.parallel.pipeline.executor": ("execute", "_send", "_compute"),
}


class Watchdog:
    """Watches this rank while the body of the context runs.

    Args:
        limits: how long a phase may take; None: nothing is watched.
        run_dir: where the stacks of a hang go.
    """

    def __init__(self, world: World, limits: Limits | None, run_dir: Path) -> None:
        self.world = world
        self.activity: Activity = world.activity
        self._is_wanted = limits is not None and sys.platform == "linux"
        self.activity.limits = limits or self.activity.limits
        self.run_dir = run_dir
        self._ended = threading.Event()
        self._line: socket.socket | None = None  # to the guard

    def __enter__(self) -> "Watchdog":
        if not self._is_wanted or threading.current_thread() is not threading.main_thread():
            return self
        (nonce,) = broadcast_ints(self.world, [time.time_ns()])  # the store may have the alarms of an earlier start
        try:
            self._stacks = os.memfd_create("stacks")
            line, there = socket.socketpair()
            with there:
                self._fork(there, nonce)
        except (OSError, AttributeError) as error:  # the system allows no process, or lacks memfd_create
            said = f"warning     no watchdog for rank {self.world.rank}: hangs are not noticed ({error})"
            print(said, file=sys.stderr, flush=True)
            return self
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        self._line = line
        self._line.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._line.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._answer, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is None:
            return
        known = None if error is None else as_triaxis_error(error)
        if error is None or (isinstance(known, TriaxisError) and known.is_shared):
            self.activity.failure = "-"
        elif isinstance(known, PeerError):
            self.activity.failure = self._failure(known, known)
        else:
            self.activity.failure = self._failure(error, known)
        self._close()

    def _fork(self, line: socket.socket, nonce: int) -> None:
        """Start the guard, as no child of this process: those are its data workers."""
        store = None if self.world.store is None else PrefixStore(f"watchdog {nonce}", self.world.store)
        seat = Seat(self.world.rank, self.world.layout.world_size, socket.gethostname(), self.run_dir, os.getpid())
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forks beside threads: the guard uses no lock of one
            child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.fork() == 0:
                    Guard(seat, self.activity, store, line, self._stacks).run()
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise OSError("the system allows no more processes")

    def _failure(self, error: BaseException, known: TriaxisError | None) -> str:
        reason = str(known) if known is not None else f"{type(error).__name__}: {error}"
        return f"rank {self.world.rank} ({socket.gethostname()}), {self.activity.position}: {reason}"

    def name_cause(self, lost: PeerError) -> None:
        """Say in `lost` which rank has ended, if its watchdog has said so; that one has reported it."""
        until = time.monotonic() + _HEARD_S * (self._line is not None)
        while not self.activity.cause and time.monotonic() < until:
            time.sleep(0.02)
        if self.activity.cause == HANG:  # whose guards end the ranks one after another, with one code
            self._ended.wait(_HANG_S)
        if cause := self.activity.cause:
            lost.args = (f"this rank ends with another one: {cause}",)
            lost.reported_elsewhere, lost.patience_s = True, 0.5

    def _close(self) -> None:
        assert self._line is not None
        self._ended.set()
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)
        self._line.shutdown(socket.SHUT_WR)  # for the guard, the end of its work
        self._line.settimeout(_HEARD_S)
        with suppress(OSError):  # it takes too long, or was killed
            self._line.recv(1)  # until it has told the others and ended
        self._line.close()

    def _answer(self) -> None:
        """Show that threads run, say where an idle rank is, and end this process when the guard says so."""
        last = -1
        while not self._ended.wait(_TICK_S):
            if code := self.activity.order:
                os._exit(code)
            self.activity.alive = time.monotonic()
            number = self.activity.note().number
            if number == last:
                with suppress(Exception):  # of a backend that does not count its calls: no reason to end
                    self.activity.sample = orjson.dumps({"number": number, **self._sample()}).decode()
            last = number

    def _sample(self) -> dict[str, Any]:
        own = {self._thread.ident, threading.get_ident()}
        frames = [frame for ident, frame in sys._current_frames().items() if ident not in own]
        found = [waiting for frame in frames if (waiting := _waits_in(frame)) is not None]
        axis, peers = found[0] if found else (None, [])
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        return {"waits": axis, "peers": peers, "calls": _calls(self.world), "where": _where(main)}


def _waits_in(frame: FrameType) -> tuple[str, list[int]] | None:
    """The axis of the communication in which the thread of `frame` waits, and the ranks on it; None if in none."""
    engine = _innermost(frame, "engine.")
    if engine is None:
        return None
    module, function, known = engine.f_globals["__name__"], engine.f_code.co_name, engine.f_locals
    functions = _COMMUNICATES.get(module, ())
    if functions is not None and function not in functions:
        return None
    if module.endswith(".agreement"):
        return "control", []
    if module.endswith(".layout"):
        return "world", []
    if module.endswith(".executor"):
        return "pipeline", _sources(known)
    group = known.get("group") or getattr(known.get("self"), "group", None)
    return None if group is None else (_axis(group), dist.get_process_group_ranks(group))


def _sources(known: Mapping[str, Any]) -> list[int]:
    """The rank from which a stage waits for the message of its action, else all stages."""
    run, action = known.get("self"), known.get("action")
    source = run.schedule.source(run.stage, action) if run is not None and action is not None else None
    return [] if run is None else [run.ranks[source[0]]] if source is not None else list(run.ranks)


def _innermost(frame: FrameType | None, package: str) -> FrameType | None:
    while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith(package):
        frame = frame.f_back
    return frame


def _where(frame: FrameType | None) -> str:
    at = _innermost(frame, "engine.") or frame
    return "" if at is None else f"{Path(at.f_code.co_filename).name}:{at.f_lineno} {at.f_code.co_name}"


def _calls(world: World) -> dict[str, int]:
    """Collectives that this rank has begun, by axis."""
    groups = (world.group, world.control_group, world.dp_group, world.tp_group, world.kv_group, world.embedding_group)
    known: list[Any] = [group for group in groups if group is not None]  # torch's type stubs lack the method
    return {_axis(group): group._get_sequence_number_for_group() for group in known}


def _axis(group: dist.ProcessGroup) -> str:
    return "world" if group.group_desc == "default_pg" else group.group_desc

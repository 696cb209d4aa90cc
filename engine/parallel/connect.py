"""Connecting the ranks: the links between them, and a watch that names the one that does not answer.

Making a communicator blocks inside NCCL or gloo until every member has come, for as long as the group's timeout, and
the error at the end of it names nobody. So every rank notes in the store which link it is connecting, and a thread ends
the process with a message if one link takes longer than a minute. Alternative considered: NCCL's non-blocking
communicators, which say that a link is not there yet but not who is missing, and which gloo does not have.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from engine.errors import ConfigError, PeerError, as_triaxis_error, end_process
from engine.parallel.activity import Activity

LIMIT_S = 60.0  # a link that takes longer than this does not work
_STORE_S = 5.0  # for reading the notes of other ranks: the store may be what is gone
_NAMED = 8  # ranks that a message lists


@dataclass(frozen=True)
class Link:
    """Ranks that one communicator connects: those of a group, or two pipeline stages on a channel.

    Attributes:
        axis: "world", "control", "dp", "tp", "kv", "tied_embedding", or a channel of `CHANNELS`.
        ranks: global ranks; of a channel, the sender and the receiver.
    """

    axis: str
    ranks: tuple[int, ...]


class Place(NamedTuple):
    """What a rank has noted in the store: its host, and the axis that it is connecting ("" if none)."""

    host: str
    axis: str


@dataclass
class _Attempt:
    """A link that is being connected since `since`; with `work`, the host is through and the device may not be."""

    link: Link
    since: float
    work: dist.Work | None = None


class Watch:
    """Ends this process with a `PeerError` if a link does not answer in time; a context manager around connecting.

    Args:
        activity: of this rank, where its watchdog, if it runs already, reads why the process has ended.

    Raises:
        PeerError: on leaving, instead of an error of the backend.
    """

    def __init__(self, store: Store, rank: int, limit_s: float = LIMIT_S, activity: Activity | None = None) -> None:
        self._store, self._rank, self._limit_s = store, rank, limit_s
        self._activity = activity
        self._attempts: list[_Attempt] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        known = None if error is None else as_triaxis_error(error)
        if isinstance(error, RuntimeError) and isinstance(known, PeerError | None) and self._attempts:
            raise self._error(self._attempts[-1].link, f"failed ({error})") from error
        if error is None:
            _note(self._store, self._rank, "")

    def begin(self, link: Link) -> None:
        """Start the clock of `link`, which the caller connects now; the one before has answered or was launched."""
        _note(self._store, self._rank, link.axis)
        launched = [attempt for attempt in self._attempts if attempt.work is not None]
        self._attempts = [*launched, _Attempt(link, time.monotonic())]

    def launched(self, work: dist.Work) -> None:
        """Keep watching the current link until `work` is complete, which on a GPU the host does not wait for."""
        self._attempts[-1].work = work

    def _run(self) -> None:
        while not self._done.wait(min(1.0, self._limit_s / 10)):
            late = self._late(time.monotonic() - self._limit_s)
            if late is not None:
                error = self._error(late, f"has not answered for {self._limit_s:g} s")
                if error.reported_elsewhere:
                    time.sleep(1)  # a launcher ends all ranks as soon as one has ended: let the other one say why
                if self._activity is not None:
                    self._activity.failure = str(error)
                end_process(error)

    def _late(self, before: float) -> Link | None:
        """Return the first link begun before the time `before` that has not answered."""
        for attempt in self._attempts:
            if attempt.since < before and (attempt.work is None or not attempt.work.is_completed()):
                return attempt.link
        return None

    def _error(self, link: Link, what: str) -> PeerError:
        """Describe `link` with what its ranks have noted. Only one of them reports it."""
        is_first, places = self._read(link)
        error = PeerError(f"the link {link.axis} of {_listed(link.ranks)} {what}: {describe_ranks(link, places)}")
        error.reported_elsewhere = not is_first
        return error

    def _read(self, link: Link) -> tuple[bool, dict[int, Place]]:
        """Return whether this rank is the first to report `link`, and the notes of its ranks."""
        first, places = [True], {}

        def read() -> None:
            # The caller's connection is locked while it waits in the store, as NCCL does for a communicator's id.
            with contextlib.suppress(RuntimeError):
                store = clone(self._store)
                first[0] = store.add(f"links/reported/{link.axis}/{link.ranks}", 1) == 1
                if first[0]:
                    places.update(_places(store, link.ranks))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(_STORE_S)
        return first[0], dict(places)


def meet(rank: int, world_size: int, *, timeout_s: float, limit_s: float = LIMIT_S) -> Store:
    """Wait in torchrun's store until all ranks have come, and return the store of this start of them.

    One rank may be slow to start, so this takes up to `timeout_s`; rank 0 names the missing ranks every `limit_s`.

    Raises:
        PeerError: not all ranks have come in time.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        shared, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistNetworkError as failure:
        where = f"MASTER_ADDR = {os.environ['MASTER_ADDR']}, MASTER_PORT = {os.environ['MASTER_PORT']}"
        raise PeerError(f"the store of rank 0 or torchrun ({where}): {failure}".partition("\n")[0]) from failure
    store = PrefixStore(f"start {_restarts(world_size)}", shared)
    store.set_timeout(timeout)
    _note(store, rank, "")
    if store.add("links/arrived", 1) == world_size:
        store.set("links/all", "")
    end = time.monotonic() + timeout_s
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(dist.DistStoreError):
            store.wait(["links/all"], timedelta(seconds=left if rank else min(limit_s, left)))
            return store
        if rank == 0:
            print(f"waiting for {_missing(store, world_size)}", file=sys.stderr, flush=True)
    error = PeerError(f"after {timeout_s:g} s these have not started: {_missing(store, world_size)}")
    error.reported_elsewhere = store.add("links/reported/arrived", 1) > 1
    raise error


def _restarts(world_size: int) -> str:
    """How often torchrun has started these ranks again (--max-restarts), with a store that still has the notes and the
    addresses of those that have ended. Not known on several nodes, which count only their own failures.
    """
    on_one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_node else "0"


def describe_ranks(link: Link, places: Mapping[int, Place]) -> str:
    """Say of each rank of `link` whether it has begun to connect, waits in `link`, or is connecting another one."""
    if not places:
        return "the store, which rank 0 or torchrun serves, does not answer either"
    unheard = [rank for rank in link.ranks if rank not in places]
    idle = [rank for rank in link.ranks if rank in places and not places[rank].axis]
    there = [rank for rank in link.ranks if rank in places and places[rank].axis == link.axis]
    elsewhere = [rank for rank in link.ranks if rank not in (*unheard, *idle, *there)]
    said = [f"not started: {_listed(unheard)}"] if unheard else []
    said += [f"not begun to connect: {_listed(idle, places)}"] if idle else []
    said += [f"at another link: {_listed(elsewhere, places, with_axis=True)}"] if elsewhere else []
    said += [f"waiting: {_listed(there, places)}"] if there else []
    if len(there) == len(link.ranks):
        said.append(
            "all have begun, so one has stopped or the network between their hosts does not let them through; "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the interface, NCCL_DEBUG=INFO shows it, "
            "parallel.connect_timeout_s gives it more time"
        )
    return "; ".join(said)


def check_hardware_queues(environment: Mapping[str, str], pp: int, device_type: str) -> None:
    """Refuse a single hardware queue where pipeline stages wait for each other on the GPU.

    Kernels of one queue start in the order of their launch. That a receive which waits there never holds up what its
    sender needs is proven in a model of the hardware, for any number of queues; it has not been run on hardware.

    Raises:
        ConfigError: CUDA_DEVICE_MAX_CONNECTIONS is 1.
    """
    if device_type == "cuda" and pp > 1 and environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "").strip() == "1":
        raise ConfigError(
            f"CUDA_DEVICE_MAX_CONNECTIONS = 1 with parallel.pp = {pp}: with one hardware queue, a receive that waits "
            "for another stage holds up all kernels launched after it, which has not been proven safe on hardware; set "
            "it to 32, as triaxis train does, or unset it"
        )


def clone(store: Any) -> Store:
    """Connect to the store once more; torch's type stubs do not have `clone`."""
    return store.clone()


def _note(store: Store, rank: int, axis: str) -> None:
    store.set(f"links/{rank}", json.dumps([socket.gethostname(), axis]))


def _places(store: Store, ranks: Iterable[int]) -> dict[int, Place]:
    keys = {rank: f"links/{rank}" for rank in ranks}
    return {rank: Place(*json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}


def _missing(store: Store, world_size: int) -> str:
    come = _places(store, range(world_size))
    return _listed([rank for rank in range(world_size) if rank not in come])


def _listed(ranks: Sequence[int], places: Mapping[int, Place] | None = None, *, with_axis: bool = False) -> str:
    """Format ranks, with their hosts and what they are connecting, as in `rank 3 (gpu-01, dp)`."""
    named = []
    for rank in ranks[:_NAMED]:
        place = places[rank] if places else None
        notes = [] if place is None else [place.host, *[place.axis] * with_axis]
        named.append(f"{rank} ({', '.join(notes)})" if notes else f"{rank}")
    rest = len(ranks) - _NAMED
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(named)}" + f" and {rest:,} more" * (rest > 0)

"""Ordered `map` over several processes, with a bounded number of items in flight and an error if a worker dies.

Each worker has its own pipe, which closes when either side dies, so the parent detects a killed worker and a worker a
killed parent. Alternatives considered: `ProcessPoolExecutor` and `multiprocessing.Pool`, whose workers share a queue: a
worker killed while writing a result leaves half a message and a held lock, and all others wait forever.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from engine.errors import TriaxisError, as_triaxis_error

AHEAD = 4  # maximum number of items in flight per worker; balances items of unequal length

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerFailed(TriaxisError):
    """A worker process was killed, or raised an error that is not caused by the input."""


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield `map(work, items)`, computed in `workers` forked processes if there is more than one.

    `work` is inherited and need not be picklable; items and results are pickled. Close the iterator to stop early.

    Raises:
        WorkerFailed: a worker was killed or raised another error. A `TriaxisError` of a worker is raised unchanged.
    """
    if workers == 1:
        yield from map(work, items)
        return
    with _worker_processes(work, workers) as idle:
        yield from _distribute(iter(items), idle, AHEAD * workers)


def _distribute(items: Iterator[Any], idle: list[Connection], limit: int) -> Iterator[Any]:
    """Yield results in order, keeping all workers busy with at most `limit` items in flight."""
    busy: dict[Connection, int] = {}  # the number of each worker's current item
    done: dict[int, Any] = {}
    sent = returned = 0
    while True:
        while idle and sent - returned < limit:
            try:
                item = next(items)
            except StopIteration:
                idle.clear()
                break
            busy[idle[-1]] = sent
            _send(idle.pop(), item)
            sent += 1
        if returned in done:
            yield done.pop(returned)
            returned += 1
        elif busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                done[busy.pop(connection)] = _receive(connection)
                idle.append(connection)
        else:
            return


@contextmanager
def _worker_processes(work: Callable[[Any], Any], count: int) -> Iterator[list[Connection]]:
    """Start `count` processes and yield the connections to them; kill them on exit."""
    fork = multiprocessing.get_context("fork")
    processes, connections = [], []
    try:
        for _ in range(count):
            ours, theirs = fork.Pipe()
            connections.append(ours)
            process = fork.Process(target=_serve, args=(work, theirs, list(connections)), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        yield list(connections)
    finally:
        for process in processes:
            process.kill()  # idle, or its result is no longer needed
            process.join()
        for connection in connections:
            connection.close()


def _serve(work: Callable[[Any], Any], connection: Connection, ends_of_parent: list[Connection]) -> None:
    """Run the loop of a worker until either side exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # for the package tokenizers: these processes are the parallelism
    for inherited in ends_of_parent:  # otherwise this pipe would stay open after the parent's death
        inherited.close()
    with suppress(EOFError, OSError):  # the parent has exited
        while True:
            connection.send(_attempt(work, connection.recv()))


def _attempt(work: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    try:
        return work(item), None
    except Exception as error:
        return None, as_triaxis_error(error) or WorkerFailed(f"in a worker process:\n{traceback.format_exc()}")


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send(item)
    except OSError:
        raise _killed() from None


def _receive(connection: Connection) -> Any:
    try:
        result, error = connection.recv()
    except (EOFError, OSError):
        raise _killed() from None
    if error is not None:
        raise error
    return result


def _killed() -> WorkerFailed:
    return WorkerFailed("a worker process was killed; if the machine ran out of memory, use fewer workers")

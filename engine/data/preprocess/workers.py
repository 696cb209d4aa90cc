"""`map` over many processes: results in order, a bounded number on the way, and a dead worker is an error.

Each worker has a pipe of its own, which ends when either side does: the parent sees a killed worker, a worker
sees a killed parent. Rejected: `ProcessPoolExecutor` and `multiprocessing.Pool`, whose workers share a queue. One
that is killed while it writes a result leaves half a message and a held lock in there, and all wait for ever.
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

AHEAD = 4  # items a worker, at most, that are read and not yet handed out; evens out items of unequal length

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerFailed(TriaxisError):
    """A worker process was killed, or met an error that is nobody's input."""


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """`map(work, items)`, in `workers` forked processes when they are more than one.

    `work` is inherited and may be anything; items and results are pickled. Close the iterator to stop early.

    Raises:
        WorkerFailed: see there. Errors for people come through as they are.
    """
    if workers == 1:
        yield from map(work, items)
        return
    with _worker_processes(work, workers) as idle:
        yield from _distribute(iter(items), idle, AHEAD * workers)


def _distribute(items: Iterator[Any], idle: list[Connection], limit: int) -> Iterator[Any]:
    """Keeps all workers busy as long as no more than `limit` items are on the way."""
    busy: dict[Connection, int] = {}  # the number of the item that each works on
    done: dict[int, Any] = {}
    sent = handed_out = 0
    while True:
        while idle and sent - handed_out < limit:
            try:
                item = next(items)
            except StopIteration:
                idle.clear()
                break
            busy[idle[-1]] = sent
            _send(idle.pop(), item)
            sent += 1
        if handed_out in done:
            yield done.pop(handed_out)
            handed_out += 1
        elif busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                done[busy.pop(connection)] = _receive(connection)
                idle.append(connection)
        else:
            return


@contextmanager
def _worker_processes(work: Callable[[Any], Any], count: int) -> Iterator[list[Connection]]:
    """Connections to `count` new processes, which are gone in the end, however that comes."""
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
            process.kill()  # idle, or working for nobody
            process.join()
        for connection in connections:
            connection.close()


def _serve(work: Callable[[Any], Any], connection: Connection, ends_of_parent: list[Connection]) -> None:
    """What a worker does until either side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of tokenizers: these processes are the parallelism
    for inherited in ends_of_parent:  # or this pipe would outlive the parent
        inherited.close()
    with suppress(EOFError, OSError):  # of the pipe: the parent is gone
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
    return WorkerFailed("a worker process was killed; if the machine ran out of memory, use fewer --workers")

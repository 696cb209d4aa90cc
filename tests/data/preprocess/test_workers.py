"""A map over processes: order, bounds, and no hang whoever dies when."""

import multiprocessing
import os
import signal
import time

import pytest

from engine.data.preprocess.workers import AHEAD, WorkerFailed, ordered_map
from engine.errors import DataError

LARGE = 1 << 20  # bytes; more than a pipe holds, so that both sides wait in the middle of a message


@pytest.fixture(autouse=True)
def no_process_remains():
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 50])
def test_order(workers, count):
    def work(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(ordered_map(work, range(count), workers)) == [i * i for i in range(count)]


def test_large_items_and_results():
    items = [bytes([i]) * LARGE for i in range(20)]
    assert list(ordered_map(lambda item: item + b"!", items, 3)) == [item + b"!" for item in items]


def test_items_on_the_way_are_bounded():
    """Reading has to wait for the slowest worker, or everything ends up in memory."""
    taken = []

    def work(i):
        time.sleep(0.3 if i == 0 else 0)
        return i

    results = ordered_map(work, (taken.append(i) or i for i in range(100)), 2)
    assert next(results) == 0
    assert len(taken) == 2 * AHEAD
    assert list(results) == list(range(1, 100))


def test_all_workers_work():
    def work(i):
        time.sleep(0.01)
        return os.getpid()

    assert len(set(ordered_map(work, range(60), 3))) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_for_people_come_through(workers):
    def work(i):
        if i == 7:
            raise DataError("seven")
        return i

    results = ordered_map(work, range(20), workers)
    with pytest.raises(DataError, match=r"^seven$"):
        list(results)


def test_other_errors_carry_their_traceback():
    with pytest.raises(WorkerFailed, match=r"(?s)in a worker process:.*Traceback.*ZeroDivisionError"):
        list(ordered_map(lambda i: 1 // i, [1, 0], 2))


@pytest.mark.parametrize("at", [0, 1, 30])
def test_a_killed_worker(at):
    def work(i):
        if i == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(LARGE)

    with pytest.raises(WorkerFailed, match="killed"):
        list(ordered_map(work, range(31), 3))


def test_workers_killed_in_the_middle_of_a_message():
    """Many times, at any moment: while they receive, work, wait to send, or have sent half."""
    for attempt in range(12):
        results = ordered_map(lambda item: item * 2, (bytes(LARGE) for _ in range(1000)), 2)
        next(results)
        os.kill(multiprocessing.active_children()[attempt % 2].pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="killed"):
            list(results)


def test_closing_early_in_the_middle_of_messages():
    for _ in range(12):
        results = ordered_map(lambda item: item * 2, (bytes(LARGE) for _ in range(1000)), 2)
        next(results)
        results.close()


def test_an_error_while_reading_items():
    def items():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(ordered_map(lambda i: i, items(), 2))

"""The loader: shares of ranks, workers that read ahead, fail and die."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.samples.batch import collate
from engine.data.samples.loader import batches
from engine.data.samples.sample import Sample
from engine.errors import ConfigError, DataFormatError, StorageError, TriaxisError

LENGTH = 6


@dataclass(frozen=True)
class Counting:
    """Sample i holds i * 10, i * 10 + 1, ...; a document starts inside it at 1 + i % 5."""

    def sample(self, i: int) -> Sample:
        return Sample.following(i * 10 + np.arange(LENGTH + 1), np.array([1 + i % (LENGTH - 1)]))


def read(dataset=None, *, rank=0, dp=1, first=0, num=24, global_batch=8, micro=2, mask=True, workers=0, pin=False):
    return batches(
        dataset or Counting(),
        first_sample=first,
        num_samples=num,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=dp,
        document_mask=mask,
        num_workers=workers,
        pin_memory=pin,
    )


def numbers(steps) -> list[list[int]]:
    """The sample numbers of each step."""
    return [[i for batch in step for i in batch.sample_numbers] for step in steps]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_batches_do_not_depend_on_the_number_of_workers(workers):
    steps = list(read(workers=workers, first=100))
    assert numbers(steps) == [list(range(start, start + 8)) for start in (100, 108, 116)]
    assert [len(step) for step in steps] == [4, 4, 4]
    for step in steps:
        for batch in step:
            expected = collate(
                [Counting().sample(i) for i in batch.sample_numbers], batch.sample_numbers, document_mask=True
            )
            for name in ("tokens", "labels", "loss_mask", "positions"):
                assert torch.equal(getattr(batch, name), getattr(expected, name))
                assert getattr(batch, name).is_contiguous()
            assert (batch.cu_seqlens, batch.num_tokens) == (expected.cu_seqlens, expected.num_tokens)


@pytest.mark.parametrize("dp, micro", [(1, 8), (2, 1), (4, 2), (8, 1)])
def test_ranks_share_each_global_batch_in_order(dp, micro):
    shares = [numbers(read(rank=rank, dp=dp, micro=micro)) for rank in range(dp)]
    assert [list(chain(*step)) for step in zip(*shares, strict=True)] == numbers(read())
    assert all(len(step) == 8 // dp for share in shares for step in share)


def test_reading_can_go_on_without_end_from_anywhere():
    steps = read(first=10**12 + 3, num=None, workers=1)
    assert [next(steps)[0].sample_numbers[0] - 10**12 for _ in range(30)] == list(range(3, 243, 8))


@pytest.mark.parametrize(
    "sizes", [{"global_batch": 6, "micro": 4}, {"global_batch": 6, "dp": 4, "micro": 1}, {"num": 25}]
)
def test_sizes_that_do_not_divide_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"batch\.global = .* must be a multiple of batch\.micro"):
        read(**sizes)


def test_reading_ahead_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(read(workers=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_batches_are_pinned():
    for step in read(workers=1, pin=True):
        assert all(batch.tokens.is_pinned() and batch.loss_mask.is_pinned() for batch in step)


# ---- workers


@dataclass(frozen=True)
class Failing:
    """Raises at one sample."""

    error: Exception
    at: int = 11

    def sample(self, i: int) -> Sample:
        if i == self.at:
            raise self.error
        return Counting().sample(i)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    "error, kind",
    [
        (DataFormatError("web.bin: size = 3"), DataFormatError),
        (OSError(5, "Input/output error", "web.bin"), StorageError),
    ],
)
def test_an_error_of_a_worker_arrives_as_it_is(workers, error, kind):
    steps = read(Failing(error), workers=workers)
    assert numbers([next(steps)]) == [list(range(8))]
    with pytest.raises(kind) as caught:
        next(steps)
    assert type(caught.value) is kind
    assert "web.bin" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_programming_error_of_a_worker_keeps_its_traceback(workers):
    with pytest.raises(
        RuntimeError, match=r"reading \(10, 11\) failed:\n(?s:.*)in sample\n(?s:.*)ZeroDivisionError: odd"
    ):
        list(read(Failing(ZeroDivisionError("odd")), workers=workers))


@dataclass(frozen=True)
class Deadly:
    """Ends the process that reads sample 11, as the kernel does where memory runs out."""

    def sample(self, i: int) -> Sample:
        if i == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return Counting().sample(i)


def test_the_death_of_a_worker_is_an_error_and_not_a_hang():
    with pytest.raises(TriaxisError, match=r"DataLoader worker .*data\.num_workers = 0"):
        list(read(Deadly(), workers=1))


@dataclass(frozen=True)
class Telling:
    """Sample i tells about the process that reads it: pid, group, threads, and what it does at Ctrl-C."""

    def sample(self, i: int) -> Sample:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        told = np.array([os.getpid(), os.getpgid(0), torch.get_num_threads(), ignored, 0, 0, 0])
        return Sample.following(told, np.array([3]))


def test_workers_survive_signals_meant_for_the_training_process():
    steps = read(Telling(), num=None, workers=1)
    pid, group, threads, ignored = next(steps)[0].tokens[0, :4].tolist()
    assert pid != os.getpid()
    assert group == pid != os.getpgid(0)
    assert (threads, ignored) == (1, 1)
    os.kill(pid, signal.SIGINT)
    assert [next(steps)[0].tokens[0, 0].item() for _ in range(10)] == [pid] * 10


def test_a_signal_to_a_worker_itself_ends_it():
    steps = read(Telling(), num=None, workers=1)
    subprocess.run(["kill", str(next(steps)[0].tokens[0, 0].item())], check=True)
    with pytest.raises(TriaxisError, match="worker"):
        list(steps)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def read_until_killed(sender: Connection) -> None:
    steps = read(Telling(), num=None, workers=1)
    sender.send(next(steps)[0].tokens[0, 0].item())
    sender.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl and /proc")
def test_workers_end_with_a_killed_training_process():
    """They hold its connections open, and its peers would wait for it until the workers look for it, in 5 seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    process = context.Process(target=read_until_killed, args=(sender,))
    process.start()
    worker = receiver.recv()
    process.kill()
    process.join()
    end = time.monotonic() + 3
    while is_running(worker):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_closing_the_iterator_ends_the_workers():
    before = len(multiprocessing.active_children())
    steps = read(num=None, workers=2)
    next(steps)
    assert len(multiprocessing.active_children()) == before + 2
    steps.close()
    assert len(multiprocessing.active_children()) == before


def test_two_loaders_do_not_disturb_each_other():
    """As an evaluation between two training steps does."""
    steps = read(num=None, workers=1)
    seen = [next(steps)]
    for _ in range(2):
        assert numbers(read(first=1000, num=8, workers=1)) == [list(range(1000, 1008))]
        seen += [next(steps) for _ in range(5)]
    assert numbers(seen) == [list(range(start, start + 8)) for start in range(0, 88, 8)]

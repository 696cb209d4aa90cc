"""The data loader: batches prefetched by worker processes.

It converts sample numbers to batches and is independent of the content of samples. The order is arithmetic: step g
reads samples [g B, (g + 1) B), each data-parallel rank a contiguous share of them, so the samples of a step do not
depend on the number of ranks, workers or microbatches.

Workers are forked, read files, compute with numpy, and return errors as values: torch would re-raise a worker's error
as another type and keep the workers alive. Alternative considered: threads, which compete with the training loop for
the interpreter lock.

Legend: b sequences of a microbatch, s sequence length, B global batch size.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from itertools import count
from traceback import format_exc
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.samples.batch import Batch, Numbers, collate
from engine.data.samples.sample import Sample
from engine.errors import ConfigError, TriaxisError, as_triaxis_error

MICROBATCHES_AHEAD = 4  # prefetched by each worker
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Samples(Protocol):
    """Any dataset with numbered samples."""

    def sample(self, i: int) -> Sample: ...


def batches(
    dataset: Samples,
    *,
    first_sample: int,
    num_samples: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    document_mask: bool,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """Yield the list of microbatches of each optimizer step for this data-parallel rank.

    Step g consists of samples `first_sample + [g B, (g + 1) B)`; rank r reads the r-th of dp_size equal shares, split
    into microbatches in order. Closing the iterator stops the workers.

    Args:
        num_samples: over all ranks, a multiple of the global batch size; None: endless.
        num_workers: prefetching processes; 0 reads in this process.

    Raises:
        ConfigError: sizes that are not divisible.
        TriaxisError: a worker raised an error or died.
    """
    per_step, rest = divmod(global_batch_size, micro_batch_size * dp_size)
    if rest or (num_samples or 0) % global_batch_size:
        raise ConfigError(
            f"batch.global = {global_batch_size} must be a multiple of batch.micro = {micro_batch_size} times "
            f"{dp_size} data-parallel ranks, and {num_samples} samples a multiple of batch.global"
        )
    steps = count() if num_samples is None else range(num_samples // global_batch_size)
    share = per_step * micro_batch_size
    numbers = (
        tuple(range(first, first + micro_batch_size))
        for step in steps
        for start in [first_sample + step * global_batch_size + dp_rank * share]
        for first in range(start, start + share, micro_batch_size)
    )
    loader = DataLoader(
        _Microbatches(dataset, document_mask),
        sampler=numbers,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=MICROBATCHES_AHEAD if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise the loader would use the global generator
    )
    return _steps(iter(loader), per_step)  # workers start now, not at the first step


def _steps(microbatches: Iterator[Batch | Exception], per_step: int) -> Iterator[list[Batch]]:
    """Group microbatches into steps. Raise errors of workers, and TriaxisError if a worker dies."""
    step: list[Batch] = []
    try:
        for item in microbatches:
            if isinstance(item, Exception):
                raise item
            step.append(item)
            if len(step) == per_step:
                yield step
                step = []
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TriaxisError(
            f"{error}: a data loader process died (killed, perhaps for lack of memory); "
            "start again, or set data.num_workers = 0 to read in the training process"
        ) from error
    finally:
        del microbatches  # stops the workers now, not when the error's traceback is garbage collected


class _Microbatches(Dataset[Batch | Exception]):
    """Map-style dataset evaluated by the workers: a tuple of sample numbers to a batch or an error."""

    def __init__(self, dataset: Samples, document_mask: bool) -> None:
        self._dataset = dataset
        self._document_mask = document_mask

    def __getitem__(self, numbers: Numbers) -> Batch | Exception:
        try:
            samples = [self._dataset.sample(i) for i in numbers]
        except Exception as error:
            return as_triaxis_error(error) or RuntimeError(f"reading {numbers} failed:\n{format_exc()}")
        return collate(samples, numbers, document_mask=self._document_mask)


def _start_worker(worker: int) -> None:
    """Shield a worker from signals to the training process, which may still be saving a checkpoint.

    Ctrl-C goes to the terminal's process group, and torchrun kills the process group of a rank. A worker ends on a
    SIGTERM sent to it, and when its parent ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # which tells the watchdog of the training process's signals
    os.setpgid(0, 0)
    if sys.platform == "linux":
        # End with the parent at once and not at the next look, seconds later: a forked worker holds the connections of
        # its rank open, so that the peers of a rank that was killed would go on waiting for it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

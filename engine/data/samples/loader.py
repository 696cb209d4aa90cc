"""Batches, read ahead by worker processes.

A loader turns sample numbers into batches and knows nothing of what a sample is. Its order is arithmetic: step g
reads samples [g B, (g + 1) B), each data-parallel rank a contiguous share of them, so the samples of a step do not
depend on how many ranks, workers or microbatches share the work.

Workers are forked, read files and compute with numpy, and hand errors over as values: raised inside a worker,
an error would come out of torch as another one, and keep the workers alive. Rejected: threads, which fight the
training loop for the interpreter lock.

Legend: b sequences of a microbatch, s sequence length, B global batch size.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from traceback import format_exc
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.samples.pretrain import Sample
from engine.data.storage.files import Array
from engine.errors import ConfigError, TriaxisError, as_triaxis_error

MICROBATCHES_AHEAD = 4  # of each worker
ROUND = 64  # products of a few sizes are prepared once, those of any size again and again

Numbers = tuple[int, ...]


class Samples(Protocol):
    """Anything with numbered samples."""

    def sample(self, i: int) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token after each.
        loss_mask: float32 [b, s], 1 where the label counts.
        positions: int64 [b, s], from 0 in each document (with document_mask) or sequence.
        cu_seqlens: on the host, where the segments that attend to themselves start among the b * s tokens,
            and b * s at the end.
        sample_numbers: one for each sequence.
        num_tokens: labels that count, on the host: a sum on the device would have to be waited for.
        target_indices: int64, which of the b * s labels count, where not all do, and a few more: a multiple of `ROUND`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: tuple[int, ...]
    sample_numbers: Numbers
    num_tokens: int
    target_indices: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Callable[..., "Batch"], tuple[object, ...]]:
        """Crosses processes as plain bytes. Torch would hand over shared memory, which crashes where /dev/shm is
        small (containers) or where the sending worker has died."""
        arrays = [tensor.numpy() for tensor in (self.tokens, self.labels, self.loss_mask, self.positions)]
        target_indices = None if self.target_indices is None else self.target_indices.numpy()
        return _batch_of_arrays, (arrays, self.cu_seqlens, self.sample_numbers, self.num_tokens, target_indices)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; from pinned memory the copy runs beside the computation."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by torch's loader where pinned memory was asked for."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            loss_mask=change(self.loss_mask),
            positions=change(self.positions),
            target_indices=None if self.target_indices is None else change(self.target_indices),
        )


def collate(samples: Sequence[Sample], numbers: Numbers, *, document_mask: bool) -> Batch:
    """Samples of one length as a batch."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))  # [b, s]
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
    b, s = tokens.shape
    starts = np.arange(b) * s
    if document_mask:
        starts = np.concatenate([np.append(0, x.boundaries) + row * s for row, x in enumerate(samples)])
    lengths = np.diff(starts, append=b * s)
    positions = np.arange(b * s) - np.repeat(starts, lengths)
    loss_mask = torch.ones(b, s)
    for row, sample in enumerate(samples):
        if sample.target_mask is not None:
            loss_mask[row] = torch.from_numpy(sample.target_mask)
    counted = loss_mask.flatten().nonzero().flatten()
    more = (loss_mask.flatten() == 0).nonzero().flatten()[: -len(counted) % ROUND]
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        positions=torch.from_numpy(positions.reshape(b, s)),
        cu_seqlens=(*starts.tolist(), b * s),
        sample_numbers=numbers,
        num_tokens=len(counted),
        target_indices=torch.cat((counted, more)).sort().values if len(counted) + len(more) < b * s else None,
    )


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
    """One list of microbatches for each optimizer step of this data-parallel rank.

    Step g holds samples `first_sample + [g B, (g + 1) B)`; rank r has the r-th of dp_size equal shares, cut into
    microbatches in order. Closing the iterator ends the workers.

    Args:
        num_samples: how many over all ranks, whole global batches; None never ends.
        num_workers: processes that read ahead; 0 reads in this one.

    Raises:
        ConfigError: sizes that do not divide.
        TriaxisError: what a worker met, or that a worker died.
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
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return _steps(iter(loader), per_step)  # workers start now and not at the first step


def _batch_of_arrays(
    arrays: Sequence[Array],
    cu_seqlens: tuple[int, ...],
    sample_numbers: Numbers,
    num_tokens: int,
    target_indices: Array | None,
) -> Batch:
    tokens, labels, loss_mask, positions = map(torch.from_numpy, arrays)
    rest = None if target_indices is None else torch.from_numpy(target_indices)
    return Batch(tokens, labels, loss_mask, positions, cu_seqlens, sample_numbers, num_tokens, rest)


def _steps(microbatches: Iterator[Batch | Exception], per_step: int) -> Iterator[list[Batch]]:
    """Groups microbatches; errors that workers handed over, and the death of one, are raised here."""
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
            f"{error}: a process that reads data ended (killed, perhaps for lack of memory); "
            "start again, or with data.num_workers = 0 to read in the training process"
        ) from error
    finally:
        del microbatches  # ends the workers now, and not when the error's traceback is forgotten


class _Microbatches(Dataset[Batch | Exception]):
    """What a worker does for a tuple of sample numbers."""

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
    """Keeps signals for the training process from ending its readers while it still saves.

    Ctrl-C goes to all of a terminal's group, and torchrun ends the whole group of a rank. A SIGTERM sent to a
    worker itself ends it, and so does the end of its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)

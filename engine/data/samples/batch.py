"""`Batch`: the samples of one microbatch as tensors.

Legend: b sequences of a microbatch, s sequence length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.data.samples.sample import Sample
from engine.data.storage.files import Array

ROUND = 64  # target counts are padded to a multiple of this, so that the head's matmuls have only a few shapes
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the next token of each.
        loss_mask: float32 [b, s], 1 if the label is a target, else 0.
        positions: int64 [b, s], from 0 in each document (with document_mask) or sequence.
        cu_seqlens: start offsets of the attention segments in the b * s tokens, then b * s; on the host.
        sample_numbers: one per sequence.
        num_tokens: number of target labels; on the host, so that no step waits for a reduction on the device.
        target_indices: int64, increasing indices into the b * s labels at which the head computes logits: all targets,
            padded with other positions to a multiple of `ROUND`. None: compute logits at all positions.
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
        """Pickle as plain bytes.

        Torch would use shared memory, which crashes if /dev/shm is small (containers) or the sending worker has died.
        """
        arrays = [tensor.numpy() for tensor in (self.tokens, self.labels, self.loss_mask, self.positions)]
        target_indices = None if self.target_indices is None else self.target_indices.numpy()
        return _batch_of_arrays, (arrays, self.cu_seqlens, self.sample_numbers, self.num_tokens, target_indices)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a device; asynchronous from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the batch to pinned memory; called by torch's `DataLoader` with `pin_memory=True`."""
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
    """Stack samples of equal length to a batch.

    Args:
        numbers: the numbers of the samples.
        document_mask: each document attends only to itself, with positions from 0.
    """
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
    targets = loss_mask.flatten().nonzero().flatten()
    padding = (loss_mask.flatten() == 0).nonzero().flatten()[: -len(targets) % ROUND]
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        positions=torch.from_numpy(positions.reshape(b, s)),
        cu_seqlens=(*starts.tolist(), b * s),
        sample_numbers=numbers,
        num_tokens=len(targets),
        target_indices=torch.cat((targets, padding)).sort().values if len(targets) + len(padding) < b * s else None,
    )


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

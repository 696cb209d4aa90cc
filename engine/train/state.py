"""Conversion between the optimizer's flat shards and the named rectangles of a checkpoint."""

from collections.abc import Iterator

import torch

from engine.checkpoint.model_directory import ModelDirectory
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.rectangles import flat_slice
from engine.checkpoint.shares import StateSlice
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.buckets import Bucket
from engine.parallel.fp8 import Fp8State
from engine.parallel.table import LogicalTensor, Rectangle

_FP8 = "fp8_amax"


def state_slices(optimizer: ShardedAdamW, fp8: Fp8State | None = None) -> Iterator[StateSlice]:
    """Yield what this rank saves, in fp32: the rectangles of its shards that it owns, and the FP8 amax history."""
    at = optimizer.parameters.world.coords
    if fp8 is not None and at.dp == 0 and at.tp == 0:
        for name, history in fp8.histories().items():
            shape = tuple(history.shape)
            yield StateSlice(_FP8, name, shape, Rectangle((0, 0), shape), history)
    if not optimizer.parameters.owns:
        return
    for shard in optimizer.shards:
        for kind, flat in shard.kinds.items():
            for tensor, rectangle, part in _rectangles(shard.bucket):
                if tensor.owned:
                    values = flat[part].view(rectangle.extent).float()
                    yield StateSlice(kind, tensor.name, tensor.shape, rectangle, values)


@torch.no_grad()
def restore(optimizer: ShardedAdamW, checkpoint: Checkpoint, fp8: Fp8State | None = None) -> None:
    """Read this rank's shards, and the FP8 amax history if the checkpoint has one of the same length and layers.

    Call `ShardedAdamW.broadcast_params` afterwards to send the parameters to all ranks. An imported model has no
    moments; they start at zero.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    for shard in optimizer.shards:
        shard.exp_avg.zero_()
        shard.exp_avg_sq.zero_()
    kinds = ("param",) if checkpoint.state.step == 0 else ("param", "exp_avg", "exp_avg_sq")
    for shard in optimizer.shards:
        for kind in kinds:
            for tensor, rectangle, part in _rectangles(shard.bucket):
                values = checkpoint.read(tensor.name, rectangle, kind=kind)
                shard.kinds[kind][part].copy_(values.flatten())
    if fp8 is not None:
        _restore_history(fp8, checkpoint)


@torch.no_grad()
def restore_weights(optimizer: ShardedAdamW, weights: ModelDirectory) -> None:
    """Read this rank's shards of the parameters from a trained model, and set the moments to zero.

    Raises:
        CheckpointError: a file is damaged.
    """
    for shard in optimizer.shards:
        shard.exp_avg.zero_()
        shard.exp_avg_sq.zero_()
        for tensor, rectangle, part in _rectangles(shard.bucket):
            shard.kinds["param"][part].copy_(weights.read(tensor.name, rectangle).flatten())


def _restore_history(fp8: Fp8State, checkpoint: Checkpoint) -> None:
    """Restore the amax history, unless its length or layers differ: the next step then uses the current amax."""
    stored = checkpoint.manifest.tensors.get(_FP8, {})
    wanted = fp8.histories()
    if any(name not in stored or stored[name].shape != tuple(into.shape) for name, into in wanted.items()):
        return
    for name, into in wanted.items():
        into.copy_(checkpoint.read(name, kind=_FP8))
    fp8.restored()


def _rectangles(bucket: Bucket) -> Iterator[tuple[LogicalTensor, Rectangle, slice]]:
    """Yield the rectangles of logical tensors in this rank's shard of the bucket, each with its slice of the shard."""
    for slot in bucket.plan.slots:
        for tensor, offset in slot.tensors():
            begin = max(offset, bucket.begin)
            end = min(offset + tensor.rectangle.size, bucket.end)
            if begin >= end:
                continue
            position = begin - bucket.begin
            for rectangle in flat_slice(tensor.rectangle, begin - offset, end - offset):
                yield tensor, rectangle, slice(position, position + rectangle.size)
                position += rectangle.size

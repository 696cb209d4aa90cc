"""Between the optimizer's flat shards and a checkpoint's named rectangles."""

from collections.abc import Iterator

import torch

from engine.checkpoint.manager import Checkpoint, Piece
from engine.checkpoint.rectangles import Rectangle, flat_slice
from engine.errors import CheckpointError
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.data import Bucket
from engine.parallel.table import LogicalTensor, ParameterTable


def pieces(optimizer: ShardedAdamW) -> Iterator[Piece]:
    """Everything this rank has to save: the rectangles of its shards, as views."""
    for shard in optimizer.shards:
        for kind, flat in shard.kinds.items():
            for tensor, rectangle, part in _owned(shard.bucket):
                yield Piece(kind, tensor.name, tensor.shape, rectangle, flat[part].view(rectangle.extent))


@torch.no_grad()
def restore(optimizer: ShardedAdamW, checkpoint: Checkpoint, table: ParameterTable) -> None:
    """Read this rank's shards and hand the parameters to all ranks.

    An imported model has weights and no moments; they start at zero then.

    Raises:
        CheckpointError: the checkpoint is of another model, or damaged.
    """
    require_same_model(checkpoint, table)
    kinds = ("param",) if checkpoint.state.step == 0 else ("param", "exp_avg", "exp_avg_sq")
    for shard in optimizer.shards:
        for kind in kinds:
            for tensor, rectangle, part in _owned(shard.bucket):
                values = checkpoint.read(kind, tensor.name, rectangle)
                shard.kinds[kind][part].copy_(values.flatten())
        optimizer.write_parameters(shard)
    optimizer.parameters.gather_parameters()


def require_same_model(checkpoint: Checkpoint, table: ParameterTable) -> None:
    """Raises CheckpointError where names or shapes differ from the model's."""
    stored = checkpoint.tensors("param")
    wanted = {tensor.name: tensor.shape for tensor in table.logical()}
    differences = [
        f"{name}: {_shape(stored.get(name))} in the checkpoint, {_shape(wanted.get(name))} in the model"
        for name in {**wanted, **stored}
        if stored.get(name) != wanted.get(name)
    ]
    if differences:
        shown = "\n  ".join(differences[:5] + [f"... and {len(differences) - 5} more"] * (len(differences) > 5))
        raise CheckpointError(
            f"{checkpoint.path} holds another model than the configuration describes:\n  {shown}\n"
            "choose another run.dir, or the model section that belongs to it"
        )


def _owned(bucket: Bucket) -> Iterator[tuple[LogicalTensor, Rectangle, slice]]:
    """The rectangles of logical tensors that lie in the bucket's shard, with their place in the shard."""
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


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape))

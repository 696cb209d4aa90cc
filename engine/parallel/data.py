"""Data parallelism: parameters and gradients in flat buckets, cut into one shard per data-parallel rank.

All parameters of a bucket lie in one flat tensor, their fp32 gradients in another. After the backward pass each
bucket's gradients are reduce-scattered; the optimizer updates this rank's shard; the new parameters are all-gathered
(ZeRO stage 1, Rajbhandari et al. 2020). With one rank the shard is the bucket and nothing is sent.
Rejected: DistributedDataParallel (gradients in the parameters' dtype, no sharded update) and FSDP (per-parameter
shards, which a flat update and a checkpoint of rectangles would have to undo).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from engine.parallel.table import LocalParameter, LogicalTensor, ParameterTable, initialise

_ALIGNMENT = 128  # elements: every parameter starts at a multiple, so vector loads and matmuls stay aligned
_BUCKET_SIZE = 1 << 25  # elements: large enough to saturate a link, small enough to overlap

# torch 2.13 renamed the two collectives; the old names warn there.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket."""

    parameter: LocalParameter
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.parameter.size

    def tensors(self) -> Iterator[tuple[LogicalTensor, int]]:
        """Each logical tensor with its offset in the bucket."""
        offset = self.offset
        for tensor in self.parameter.tensors:
            yield tensor, offset
            offset += tensor.rectangle.size


@dataclass(frozen=True)
class BucketPlan:
    """The arithmetic of a bucket: decaying parameters first, so that weight decay is two ranges.

    `size` is a multiple of the number of ranks times the alignment; the tail is padding.
    """

    slots: tuple[Slot, ...]
    decay_end: int
    size: int


class Bucket:
    """Flat parameters [size] in the model's dtype and flat fp32 gradients [size], with this rank's shard of both."""

    def __init__(self, plan: BucketPlan, dtype: torch.dtype, device: torch.device, rank: int, ranks: int) -> None:
        self.plan = plan
        self.begin = plan.size // ranks * rank
        self.end = plan.size // ranks * (rank + 1)
        self.param = torch.zeros(plan.size, dtype=dtype, device=device)
        self.grad = torch.zeros(plan.size, dtype=torch.float32, device=device)
        self.param_shard = self.param[self.begin : self.end]
        self.grad_shard = self.grad[self.begin : self.end]


def plan_buckets(table: ParameterTable, ranks: int, bucket_size: int = _BUCKET_SIZE) -> list[BucketPlan]:
    """Cut the parameters into buckets in the order in which the backward pass finishes them (last layer first)."""
    groups: list[list[LocalParameter]] = [[]]
    for parameter in reversed(table.parameters):
        if groups[-1] and sum(p.size for p in groups[-1]) + parameter.size > bucket_size:
            groups.append([])
        groups[-1].append(parameter)
    return [_plan(group, ranks) for group in groups]


def _plan(group: list[LocalParameter], ranks: int) -> BucketPlan:
    slots, offset, decay_end = [], 0, 0
    for parameter in sorted(group, key=lambda p: not p.decays):
        slots.append(Slot(parameter, offset))
        offset = _round_up(offset + parameter.size, _ALIGNMENT)
        decay_end = offset if parameter.decays else decay_end
    return BucketPlan(tuple(slots), decay_end, _round_up(offset, ranks * _ALIGNMENT))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class ShardedParameters:
    """The parameters of a model and their gradients, sharded over the data-parallel ranks.

    Attributes:
        by_path: the trainable tensors, views of the buckets, under the paths of the table.
        buckets: in the order in which the backward pass finishes them.
    """

    def __init__(
        self,
        table: ParameterTable,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        bucket_size: int = _BUCKET_SIZE,
    ) -> None:
        self.group = group
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        plans = plan_buckets(table, ranks, bucket_size)
        self.buckets = [Bucket(plan, dtype, device, rank, ranks) for plan in plans]
        self.by_path: dict[str, nn.Parameter] = {}
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                self.by_path[slot.parameter.path] = _trainable_view(bucket, slot)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Initial weights, the same on every rank."""
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                initialise(slot.parameter, self.by_path[slot.parameter.path].data, seed)

    def zero_grad(self) -> None:
        for bucket in self.buckets:
            bucket.grad.zero_()

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks; each rank's shard then holds the total."""
        if self.group is None:
            return
        pending = [
            _reduce_scatter(bucket.grad_shard, bucket.grad, group=self.group, async_op=True) for bucket in self.buckets
        ]
        _wait(pending)

    def gather_parameters(self) -> None:
        """Give every rank the parameters that the others have updated."""
        if self.group is None:
            return
        pending = [
            _all_gather(bucket.param, bucket.param_shard, group=self.group, async_op=True) for bucket in self.buckets
        ]
        _wait(pending)

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of all gradients, of shape [1]; call after `reduce_gradients`. Padding is zero and adds nothing."""
        square = torch.stack([torch.linalg.vector_norm(bucket.grad_shard) for bucket in self.buckets]).square().sum()
        square = square.reshape(1)
        if self.group is not None:
            dist.all_reduce(square, group=self.group)
        return square.sqrt()


def _trainable_view(bucket: Bucket, slot: Slot) -> nn.Parameter:
    """A parameter on the bucket's storage whose gradients are added to the bucket in fp32."""
    parameter = nn.Parameter(bucket.param[slot.offset : slot.end].view(slot.parameter.shape))
    main_grad = bucket.grad[slot.offset : slot.end].view(slot.parameter.shape)

    def accumulate(parameter: torch.Tensor) -> None:
        main_grad.add_(parameter.grad)  # type: ignore[arg-type]
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return parameter


def _wait(pending: list[dist.Work | None]) -> None:
    for work in pending:
        if work is not None:
            work.wait()

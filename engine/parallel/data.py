"""Data parallelism: parameters and gradients in flat buckets, cut into one shard per data-parallel rank.

All parameters of a bucket lie in one flat tensor, their fp32 gradients in another. When the backward pass of the last
microbatch has completed a bucket, its gradients are reduce-scattered during that pass; the optimizer updates this
rank's shard; the new parameters are all-gathered while the next forward pass begins, whose layers wait for the buckets
they need (ZeRO stage 1, Rajbhandari et al. 2020). Unsharded, the gradients are all-reduced and every rank updates
everything. With one rank the shard is the bucket and nothing is sent.

Main gradients are fp32. The sum over the data-parallel ranks may be in bf16, in half the bytes: each rank's bucket is
rounded once it is complete, and the sum is widened again. Sums over ranks with the same parameters stay fp32.
Alternatives considered: DistributedDataParallel (gradients in the parameters' dtype, no sharded update) and FSDP
(per-parameter shards, which a flat update and a checkpoint of rectangles would have to undo).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.ops.grad_norm import square_sum
from engine.parallel.collectives import CompletedWork, Work, all_gather, all_reduce, reduce_scatter
from engine.parallel.gradients import GradientFlow, GradientSink, trained_parameter
from engine.parallel.layout import World
from engine.parallel.table import LocalParameter, LogicalTensor, ParameterTable, Replicas, initialize

_ALIGNMENT = 128  # elements: every parameter starts at a multiple, so vector loads and matmuls stay aligned
_BUCKET_SIZE = 1 << 25  # elements: large enough to saturate a link, small enough to overlap


@dataclass(frozen=True)
class Slot:
    """The range of a bucket that holds a parameter."""

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

    `size` is a multiple of the number of shards times the alignment; the tail is padding.
    """

    slots: tuple[Slot, ...]
    decay_end: int
    size: int

    def ranges(self, replicas: Replicas) -> list[slice]:
        """The ranges of the tensors that the ranks of `replicas` hold together."""
        found = [slice(offset, offset + t.rectangle.size) for t, offset in self._tensors() if t.replicas == replicas]
        return _merged(found)

    def owned(self, begin: int, end: int) -> list[slice]:
        """The parts of [begin, end) that this rank counts, in positions from `begin`."""
        found = [
            slice(max(offset, begin) - begin, min(offset + tensor.rectangle.size, end) - begin)
            for tensor, offset in self._tensors()
            if tensor.owned and offset < end and offset + tensor.rectangle.size > begin
        ]
        return _merged(found)

    def _tensors(self) -> Iterator[tuple[LogicalTensor, int]]:
        for slot in self.slots:
            yield from slot.tensors()


class Bucket:
    """Flat parameters [size] in the model's dtype and flat fp32 gradients [size], with this rank's shard of both.

    Attributes:
        incomplete: paths of the parameters whose gradients this step has not completed yet.
        reducing, gathering: the communication in progress.
    """

    def __init__(self, plan: BucketPlan, dtype: torch.dtype, device: torch.device, shard: int, shards: int) -> None:
        self.plan = plan
        self.begin = plan.size // shards * shard
        self.end = plan.size // shards * (shard + 1)
        self.param = torch.zeros(plan.size, dtype=dtype, device=device)
        self.grad = torch.zeros(plan.size, dtype=torch.float32, device=device)
        self.param_shard = self.param[self.begin : self.end]
        self.grad_shard = self.grad[self.begin : self.end]
        self.incomplete: set[str] = set()
        self.reducing: Work | None = None
        self.gathering: Work | None = None

    @property
    def paths(self) -> set[str]:
        return {slot.parameter.path for slot in self.plan.slots}


def plan_buckets(table: ParameterTable, shards: int, bucket_size: int = _BUCKET_SIZE) -> list[BucketPlan]:
    """Cut the parameters into buckets in the order in which the backward pass finishes them (last layer first).

    Embeddings that both ends of a pipeline share have a bucket of their own: it must wait for the other end.
    """
    groups: list[list[LocalParameter]] = [[]]
    for parameter in reversed(table.parameters):
        full = sum(p.size for p in groups[-1]) + parameter.size > bucket_size
        if groups[-1] and (full or _shared_by_ends(parameter) or _shared_by_ends(groups[-1][0])):
            groups.append([])
        groups[-1].append(parameter)
    return [_plan(group, shards) for group in groups]


def _shared_by_ends(parameter: LocalParameter) -> bool:
    return parameter.tensors[0].replicas == "tied_embedding"


def _plan(group: list[LocalParameter], shards: int) -> BucketPlan:
    slots, offset, decay_end = [], 0, 0
    for parameter in sorted(group, key=lambda p: not p.weight_decay):
        slots.append(Slot(parameter, offset))
        offset = _round_up(offset + parameter.size, _ALIGNMENT)
        decay_end = offset if parameter.weight_decay else decay_end
    return BucketPlan(tuple(slots), decay_end, _round_up(offset, shards * _ALIGNMENT))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _merged(ranges: list[slice]) -> list[slice]:
    """Adjacent ranges as one."""
    merged: list[slice] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


class ShardedParameters:
    """The parameters of a model part and their gradients, sharded over the data-parallel ranks.

    Attributes:
        by_path: the trainable tensors, views of the buckets, under the paths of the table.
        sinks: what takes their gradients, under the same paths.
        buckets: in the order in which the backward pass finishes them.
        flow: where the running backward pass stands; the pipeline's executor sets it.
        owns: whether this rank counts its shards in norms and writes them into checkpoints; one of the data-parallel
            ranks does where the shards are not divided.
    """

    def __init__(
        self,
        table: ParameterTable,
        dtype: torch.dtype,
        world: World,
        *,
        sharded: bool = True,
        reduce_dtype: torch.dtype = torch.float32,
        bucket_size: int = _BUCKET_SIZE,
    ) -> None:
        """
        Args:
            dtype: of the parameters.
            sharded: whether each data-parallel rank updates a shard, or everything.
            reduce_dtype: in which gradients are summed over the data-parallel ranks: fp32 or bf16.
            bucket_size: elements of a bucket, unless one parameter has more.
        """
        self.world = world
        self.sharded = sharded
        self.reduce_dtype = reduce_dtype
        self.owns = sharded or world.coords.dp == 0
        shard, shards = (world.coords.dp, world.layout.dp) if sharded else (0, 1)
        plans = plan_buckets(table, shards, bucket_size)
        self.buckets = [Bucket(plan, dtype, world.device, shard, shards) for plan in plans]
        self.flow = GradientFlow(self._completed)
        self.by_path: dict[str, nn.Parameter] = {}
        self.sinks: dict[str, GradientSink] = {}
        self._bucket_of: dict[str, Bucket] = {}
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                path, part = slot.parameter.path, slice(slot.offset, slot.end)
                values, grad = (flat[part].view(slot.parameter.shape) for flat in (bucket.param, bucket.grad))
                self.sinks[path] = sink = GradientSink(path, grad, self.flow)
                self.by_path[path] = trained_parameter(values, sink)
                self._bucket_of[path] = bucket

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Initial weights, the same in every layout."""
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                initialize(slot.parameter, self.by_path[slot.parameter.path].data, seed)

    def wait_for_params_before_forward(self, module: nn.Module) -> None:
        """Make `module` wait for its parameters each time it is called."""
        held = set(module.parameters())
        buckets = list(dict.fromkeys(self._bucket_of[path] for path, p in self.by_path.items() if p in held))
        module.register_forward_pre_hook(lambda *_: self._wait_for(buckets))

    def begin_step(self) -> None:
        """Zero the gradients of the last step."""
        for bucket in self.buckets:
            bucket.grad.zero_()
            bucket.incomplete = bucket.paths

    def _completed(self, path: str) -> None:
        bucket = self._bucket_of[path]
        bucket.incomplete.discard(path)
        if not bucket.incomplete and not bucket.plan.ranges("tied_embedding"):
            self._start_reducing(bucket)

    def reduce_gradients(self) -> None:
        """Finish the sums over all ranks that hold a parameter; the shards then hold the totals."""
        for bucket in self.buckets:
            if bucket.reducing is None:
                self._start_reducing(bucket)
        for bucket in self.buckets:
            assert bucket.reducing is not None
            bucket.reducing.wait()
            bucket.reducing = None

    def _start_reducing(self, bucket: Bucket) -> None:
        world = self.world
        groups: dict[Replicas, ProcessGroup | None] = {
            "tp": world.tp_group,
            "kv": world.kv_group,
            "tied_embedding": world.embedding_group,
        }
        for replicas, group in groups.items():
            if ranges := bucket.plan.ranges(replicas):
                assert group is not None
                _sum_over_replicas(bucket.grad, ranges, group)
        bucket.reducing = CompletedWork() if world.dp_group is None else self._sum_over_dp(bucket, world.dp_group)

    def _sum_over_dp(self, bucket: Bucket, group: ProcessGroup) -> Work:
        """Start summing the gradients of `bucket`; after `wait` its shard holds the totals in fp32."""
        bf16 = self.reduce_dtype == torch.bfloat16
        grad = _rounded_in_place(bucket.grad) if bf16 else bucket.grad
        shard = grad[bucket.begin : bucket.end]
        work = reduce_scatter(shard, grad, group) if self.sharded else all_reduce(grad, group)
        return _Widened(work, shard, bucket.grad_shard) if bf16 else work

    def gather(self, bucket: Bucket) -> None:
        """Start gathering the parameters of `bucket` from the ranks that have updated them."""
        self._wait_for([bucket])
        if self.world.dp_group is not None and self.sharded:
            bucket.gathering = all_gather(bucket.param, bucket.param_shard, self.world.dp_group)

    def finish_gathering(self) -> None:
        """Wait for all parameters: before a checkpoint is saved, or the ranks disconnect."""
        self._wait_for(self.buckets)

    def _wait_for(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            if bucket.gathering is not None:
                bucket.gathering.wait()
                bucket.gathering = None

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients, fp32 [1], each logical element counted once; call after `reduce_gradients`."""
        square = torch.zeros(1, device=self.world.device)
        for bucket in self.buckets if self.owns else ():
            for part in bucket.plan.owned(bucket.begin, bucket.end):
                square += square_sum(bucket.grad_shard[part])
        self.world.sum_on_device(square)
        return square.sqrt()


def _sum_over_replicas(grad: Tensor, ranges: list[slice], group: ProcessGroup) -> None:
    """Sum the parts of a gradient that ranks with the same parameters hold; one message for all ranges."""
    flat = grad[ranges[0]] if len(ranges) == 1 else torch.cat([grad[part] for part in ranges])
    all_reduce(flat, group).wait()
    if len(ranges) > 1:
        sizes = [part.stop - part.start for part in ranges]
        for part, values in zip(ranges, flat.split(sizes), strict=True):
            grad[part] = values


def _rounded_in_place(grad: Tensor) -> Tensor:
    """Round fp32 `grad` [n] to bf16 [n], which takes over the first half of its memory: nothing is kept besides while
    several buckets are under way, only a copy for a moment.
    """
    rounded = grad.view(torch.bfloat16)[: grad.numel()]
    return rounded.copy_(grad.bfloat16())


@dataclass(frozen=True)
class _Widened:
    """A sum in bf16 in progress, which `wait` copies to `out`, fp32; the memory of the two may overlap."""

    work: Work
    total: Tensor
    out: Tensor

    def wait(self) -> None:
        self.work.wait()
        self.out.copy_(self.total.float())

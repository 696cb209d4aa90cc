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

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.ops.grad_norm import square_sum
from engine.parallel.buckets import BUCKET_SIZE, Bucket, plan_buckets
from engine.parallel.collectives import CompletedWork, Work, all_gather, all_reduce, reduce_scatter
from engine.parallel.fp8_weights import Fp8Weights, placeholder
from engine.parallel.gradients import GradientFlow, GradientSink, trained_parameter
from engine.parallel.layout import World
from engine.parallel.table import ParameterTable, Replicas, initialize


class ShardedParameters:
    """The parameters of a model part and their gradients, sharded over the data-parallel ranks.

    Attributes:
        by_path: the trainable tensors, views of the buckets, under the paths of the table.
        sinks: what takes their gradients, under the same paths.
        buckets: in the order in which the backward pass finishes them.
        flow: where the running backward pass stands; the pipeline's executor sets it.
        fp8: the weights that are gathered in FP8; their tensors in `by_path` are placeholders. None: there are none.
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
        in_fp8: Collection[str] = (),
        bucket_size: int = BUCKET_SIZE,
    ) -> None:
        """Allocate the buckets; parameters are zero.

        Args:
            dtype: of the parameters.
            sharded: whether each data-parallel rank updates a shard, or everything.
            reduce_dtype: in which gradients are summed over the data-parallel ranks: fp32 or bf16.
            in_fp8: paths of the weights that are gathered in FP8, if there are other ranks to gather from.
            bucket_size: elements of a bucket, unless one parameter has more.
        """
        self.world = world
        self.sharded = sharded
        self.reduce_dtype = reduce_dtype
        self.owns = sharded or world.coords.dp == 0
        shard, shards = (world.coords.dp, world.layout.dp) if sharded else (0, 1)
        plans = plan_buckets(table, shards, bucket_size, in_fp8 if shards > 1 else ())
        self.buckets = [Bucket(plan, dtype, world.device, shard, shards) for plan in plans]
        self.fp8 = Fp8Weights(self.buckets, world) if any(plan.in_fp8 for plan in plans) else None
        self.flow = GradientFlow(self._completed)
        self.by_path: dict[str, nn.Parameter] = {}
        self.sinks: dict[str, GradientSink] = {}
        self._bucket_of: dict[str, Bucket] = {}
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                path, shape, part = slot.parameter.path, slot.parameter.shape, slice(slot.offset, slot.end)
                grad = bucket.grad[part].view(shape)
                values = placeholder(shape, bucket.param) if bucket.plan.in_fp8 else bucket.param[part].view(shape)
                self.sinks[path] = sink = GradientSink(path, grad, self.flow)
                self.by_path[path] = trained_parameter(values, sink)
                self._bucket_of[path] = bucket

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Initial weights, the same in every layout; a collective if some are gathered in FP8."""
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                if bucket.plan.in_fp8:
                    whole = bucket.param.new_empty(slot.parameter.shape)
                    initialize(slot.parameter, whole, seed)
                    here, there = bucket.part(slot)
                    bucket.param_shard[there] = whole.flatten()[here]
                else:
                    initialize(slot.parameter, self.by_path[slot.parameter.path].data, seed)
        self.gather_with_fp8()
        self.finish_gathering()  # the optimizer copies the shards next

    def wait_for_params_before_forward(self, module: nn.Module) -> None:
        """Make `module` wait for its parameters each time it is called."""
        held = set(module.parameters())
        buckets = list(dict.fromkeys(self._bucket_of[path] for path, p in self.by_path.items() if p in held))
        module.register_forward_pre_hook(lambda *_: self._wait_for(buckets))

    def begin_step(self) -> None:
        """Begin to accumulate new gradients: the first addition to each overwrites that of the last step."""
        self.flow.step += 1
        for bucket in self.buckets:
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
        for path in bucket.paths:
            self.sinks[path].zero_unless_added_to()
        for padding in bucket.plan.padding():
            bucket.grad[padding].zero_()
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
        """Start gathering the parameters of `bucket` from the ranks that have updated them, unless some buckets are
        gathered in FP8: then `gather_with_fp8` starts all.
        """
        if self.fp8 is None:
            self._start_gathering(bucket)

    def gather_with_fp8(self) -> None:
        """Start gathering all buckets if some are gathered in FP8; call after `gather`. Scales need the amax of all
        shards, so these come first, and messages still start in the order in which the forward pass waits for them.
        """
        if self.fp8 is not None:
            self.fp8.update_scales()
            for bucket in reversed(self.buckets):
                self._start_gathering(bucket)

    def _start_gathering(self, bucket: Bucket) -> None:
        self._wait_for([bucket])
        if self.world.dp_group is None or not self.sharded:
            return
        values, shard = bucket.param, bucket.param_shard
        if bucket.plan.in_fp8:
            assert self.fp8 is not None
            values, shard = self.fp8.quantize_shard(bucket)
        bucket.gathering = all_gather(values, shard, self.world.dp_group)

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
        pieces = [b.grad_shard[part] for b in self.buckets if self.owns for part in b.plan.owned(b.begin, b.end)]
        square = square_sum(pieces)[None] if pieces else torch.zeros(1, device=self.world.device)
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

"""Flat buckets of parameters and gradients: the arithmetic of their layout, and the tensors.

A bucket holds the parameters that the backward pass finishes one after another, so that their gradients are reduced in
one message while the pass goes on. `plan_buckets` is pure; the memory estimate and tests read the same plans.
Alternative considered: one bucket per layer (norms of their own tiny messages; embeddings far larger than a layer).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.parallel.collectives import Work
from engine.parallel.table import LocalParameter, LogicalTensor, ParameterTable, Replicas

ALIGNMENT = 128  # elements: every parameter starts at a multiple, so vector loads and matmuls stay aligned
BUCKET_SIZE = 1 << 25  # elements: large enough to saturate a link, small enough to overlap


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

    `size` is a multiple of the number of shards times the alignment; the tail is padding. `in_fp8`: it has weights of
    FP8 matmuls, which ranks gather in FP8.
    """

    slots: tuple[Slot, ...]
    decay_end: int
    size: int
    in_fp8: bool = False

    def ranges(self, replicas: Replicas) -> list[slice]:
        """The ranges of the tensors that the ranks of `replicas` hold together."""
        found = [slice(offset, offset + t.rectangle.size) for t, offset in self._tensors() if t.replicas == replicas]
        return _merged(found)

    def padding(self) -> list[slice]:
        """The ranges that belong to no parameter."""
        ends = [0, *(slot.end for slot in self.slots)]
        starts = [*(slot.offset for slot in self.slots), self.size]
        return [slice(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

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
        param: [size]; of weights gathered in FP8 only the shard, since nothing reads the rest.
        incomplete: paths of the parameters whose gradients this step has not completed yet.
        reducing, gathering: the communication in progress.
    """

    def __init__(self, plan: BucketPlan, dtype: torch.dtype, device: torch.device, shard: int, shards: int) -> None:
        self.plan = plan
        self.begin = plan.size // shards * shard
        self.end = plan.size // shards * (shard + 1)
        kept = slice(self.begin, self.end) if plan.in_fp8 else slice(0, plan.size)
        self.param = torch.zeros(kept.stop - kept.start, dtype=dtype, device=device)
        self.grad = torch.zeros(plan.size, dtype=torch.float32, device=device)
        self.param_shard = self.param[self.begin - kept.start : self.end - kept.start]
        self.grad_shard = self.grad[self.begin : self.end]
        self.incomplete: set[str] = set()
        self.reducing: Work | None = None
        self.gathering: Work | None = None

    @property
    def paths(self) -> set[str]:
        return {slot.parameter.path for slot in self.plan.slots}

    def part(self, slot: Slot) -> tuple[slice, slice]:
        """The elements of `slot` in this rank's shard: in positions of the parameter, and of the shard."""
        begin = max(slot.offset, self.begin)
        end = max(begin, min(slot.end, self.end))
        return slice(begin - slot.offset, end - slot.offset), slice(begin - self.begin, end - self.begin)


def plan_buckets(
    table: ParameterTable, shards: int, bucket_size: int = BUCKET_SIZE, in_fp8: Collection[str] = ()
) -> list[BucketPlan]:
    """Cut the parameters into buckets in the order in which the backward pass finishes them (last layer first).

    Embeddings that both ends of a pipeline share have a bucket of their own: it must wait for the other end. So have
    the weights that ranks gather in FP8, of paths `in_fp8`: one message has one dtype.
    """
    finished = table.parameters[::-1]
    apart = [[p for p in finished if (p.path in in_fp8) == which] for which in (True, False)]
    groups = [group for parameters in apart for group in _groups(parameters, bucket_size)]
    groups.sort(key=lambda group: finished.index(group[-1]))
    return [_plan(group, shards, group[0].path in in_fp8) for group in groups]


def _groups(parameters: Sequence[LocalParameter], bucket_size: int) -> list[list[LocalParameter]]:
    groups: list[list[LocalParameter]] = []
    for parameter in parameters:
        full = not groups or sum(p.size for p in groups[-1]) + parameter.size > bucket_size
        if full or _shared_by_ends(parameter) or _shared_by_ends(groups[-1][0]):
            groups.append([])
        groups[-1].append(parameter)
    return groups


def _shared_by_ends(parameter: LocalParameter) -> bool:
    return parameter.tensors[0].replicas == "tied_embedding"


def _plan(group: list[LocalParameter], shards: int, in_fp8: bool) -> BucketPlan:
    slots, offset, decay_end = [], 0, 0
    for parameter in sorted(group, key=lambda p: not p.weight_decay):
        slots.append(Slot(parameter, offset))
        offset = _round_up(offset + parameter.size, ALIGNMENT)
        decay_end = offset if parameter.weight_decay else decay_end
    return BucketPlan(tuple(slots), decay_end, _round_up(offset, shards * ALIGNMENT), in_fp8)


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

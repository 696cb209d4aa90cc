"""Weights that data-parallel ranks all-gather in FP8 after the update, in half the bytes of bf16.

The matmuls of such a weight read E4M3 values and one scale (recipes "tensorwise" and "delayed"), so ranks gather those
instead of its bf16 values. The scale is that of the whole weight: every rank takes the amax of its shard, and one max
over the ranks serves all weights. Values and scales are bitwise those that quantizing the gathered bf16 weight gives.
Of the bf16 weight each rank keeps the shard that it updates; the rest has no memory and reads as NaN.
Alternative considered: the scale of the step before, which needs no max, but gives other values and may saturate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops.quantize import TENSORWISE, QuantizedTensor, quantize, scale_from_amax, update_amax
from engine.parallel.buckets import ALIGNMENT, Bucket
from engine.parallel.collectives import all_max
from engine.parallel.fp8 import WEIGHT_DTYPE
from engine.parallel.layout import World


class Fp8Weights:
    """The E4M3 values of all buckets `in_fp8`, and the scales of their weights.

    Attributes:
        by_path: the quantized weights, [out, in] each; views of memory that every gathering overwrites.
    """

    def __init__(self, buckets: Sequence[Bucket], world: World) -> None:
        self.world = world
        self._buckets = [bucket for bucket in buckets if bucket.plan.in_fp8]
        slots = [(bucket, slot) for bucket in self._buckets for slot in bucket.plan.slots]
        self._number = {slot.parameter.path: number for number, (_, slot) in enumerate(slots)}
        self._amax, self._scale, self._scale_inv = (torch.zeros(len(slots), device=world.device) for _ in range(3))
        self._values = {b: torch.zeros(b.plan.size, dtype=torch.uint8, device=world.device) for b in self._buckets}
        self.by_path: dict[str, QuantizedTensor] = {}
        for number, (bucket, slot) in enumerate(slots):
            values = self._values[bucket][slot.offset : slot.end].view(WEIGHT_DTYPE).view(slot.parameter.shape)
            scale_inv = self._scale_inv[number : number + 1]
            self.by_path[slot.parameter.path] = QuantizedTensor(values, scale_inv, TENSORWISE)

    def update_scales(self) -> None:
        """Compute the scales from the current amax of all weights, max-reduced over the dp and tp groups."""
        self._amax.zero_()
        for bucket in self._buckets:
            for number, part in self._parts(bucket):
                update_amax(self._amax[number : number + 1], bucket.param_shard[part])
        for group in (self.world.dp_group, self.world.tp_group):
            if group is not None:
                all_max(self._amax, group).wait()
        self._scale.copy_(scale_from_amax(self._amax, WEIGHT_DTYPE))
        self._scale_inv.copy_(self._scale.reciprocal())

    def quantize_shard(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Quantize this rank's shard; return the bytes of all values, uint8 [size], and of the shard, a part of it."""
        values = self._values[bucket]
        shard = values[bucket.begin : bucket.end]
        for number, part in self._parts(bucket):
            rows = bucket.param_shard[part].view(-1, ALIGNMENT)  # kernels take matrices
            scale, scale_inv = (of_all[number : number + 1] for of_all in (self._scale, self._scale_inv))
            quantized, _ = quantize(rows, WEIGHT_DTYPE, TENSORWISE, scale=scale, scale_inv=scale_inv)
            assert quantized is not None
            shard[part] = quantized.values.view(torch.uint8).flatten()
        return values, shard

    def _parts(self, bucket: Bucket) -> list[tuple[int, slice]]:
        """The number of each weight of which this rank's shard holds a part, and that part."""
        parts = [(self._number[slot.parameter.path], bucket.part(slot)[1]) for slot in bucket.plan.slots]
        return [(number, part) for number, part in parts if part.stop > part.start]


def placeholder(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of NaN without memory, of the dtype and device of `like`: for autograd, which follows a weight that
    nothing reads.
    """
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(tuple(shape))

"""Memory that a rank needs, and memory that it has."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.derived import microbatches
from engine.config.schema import Config, ParallelConfig
from engine.model.parameters import kv_replicas, parameter_table
from engine.ops.cross_entropy import chunk_rows
from engine.parallel.buckets import plan_buckets
from engine.parallel.fp8 import runs_in_fp8
from engine.parallel.layout import CHANNELS, Coordinates, Layout, TensorParallel, ranks_per_gpu
from engine.parallel.pipeline.partition import Part
from engine.parallel.table import ParameterTable
from engine.plan.activations import ActivationSizes, peak_bytes
from engine.plan.stages import stage_parts

GIB, MIB = 1 << 30, 1 << 20
USABLE = 0.9  # fraction of a rank's memory to plan with; the rest is for fragmentation and errors of the estimate
# Beside tensors: the CUDA context, libraries and their workspaces; on a CPU what libraries and the allocator keep: 0.1
# to 0.4 GiB in the layouts of docs/measurements.md.
_ALLOWANCE = {"cuda": 2 * GIB, "cpu": 400 * MIB}
# An NCCL communicator with NCCL's defaults on the NVLink of an H100: 24 channels (github.com/NVIDIA/nccl/issues/1367),
# each with 10 MiB to receive in (NCCL_BUFFSIZE = 4 MiB, LL128 4.7 MiB, LL 0.5 MiB, in pages of 2 MiB) and 2 MiB to send
# from (github.com/NVIDIA/nccl/issues/1685). Not measured with this engine; more than it takes across nodes or on PCIe.
_COMMUNICATOR = 24 * (10 + 2) * MIB
_BOUNDARIES_PER_LINK = 2  # messages of one channel at once: posted and being computed with, or being sent


@dataclass(frozen=True)
class MemoryEstimate:
    """Training memory of one rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    links: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        unit, name = unit_of(self.total)
        listed = ", ".join(f"{kind} {size / unit:.1f}" for kind, size in asdict(self).items())
        return f"{self.total / unit:.1f} {name} per rank ({listed})"


@dataclass(frozen=True)
class ClusterSpec:
    """The ranks of a run, assumed to be identical.

    Attributes:
        count: number of ranks.
        per_node: ranks per node, connected by fast links.
        capacity: bytes of memory per rank.
        dtype: dtype of the weights.
    """

    count: int
    per_node: int
    capacity: int
    device_type: str
    dtype: torch.dtype


def unit_of(size: int) -> tuple[int, str]:
    """Return the unit in which to show `size` bytes, and its name."""
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def estimate(config: Config, layout: Layout, stage: int, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Estimate the memory of a rank of pipeline stage `stage`.

    Weights are in `dtype` and, for FP8, also in 8 bits, row-major and transposed; of those that are gathered in FP8,
    only a shard is in `dtype`. Gradients are in fp32. Moments, and fp32 master weights if the model is not fp32, are
    sharded over the data-parallel ranks. Activations are those saved for backward passes at the schedule's activation
    peak. Links are the hidden states on the way between stages and, on a GPU, the buffers of NCCL's communicators. The
    workspace is the temporary memory of a layer or of the loss, of gradients that are rounded to be summed in bf16, and
    an allowance for libraries. On a GPU the operators are assumed to be those of csrc; plain PyTorch takes more.
    """
    model, parallel = config.model, config.parallel
    parts = stage_parts(model, parallel, config.data.seq_length, layout.pp, stage)
    table = parameter_table(model, parts, TensorParallel(0, layout.tp))
    size = table.local_size
    in_fp8 = sum(p.size for p in table.parameters if runs_in_fp8(p, config.precision, config.model.num_layers))
    states = (0 if dtype == torch.float32 else 4) + (8 if config.optimizer.moments == "fp32" else 4)
    sizes = ActivationSizes.of(model, config.batch, config.data, config.precision, layout.tp, dtype.itemsize)
    count = microbatches(config.batch, layout.dp)
    return MemoryEstimate(
        parameters=_parameters(size, in_fp8, dtype.itemsize, layout.dp if parallel.fp8_param_gather else 1),
        gradients=size * 4,
        optimizer=size * states // (layout.dp if parallel.sharded_optimizer else 1),
        activations=peak_bytes(sizes, parts, parallel, layout.pp, stage, count),
        links=_links(config, layout, stage, sizes, device_type),
        workspace=_workspace(sizes, parallel.recompute, parts, device_type) + _rounding(table, parallel, layout.dp),
    )


def estimate_fullest(config: Config, layout: Layout, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Estimate the memory of a rank of the stage that needs most."""
    estimates = (estimate(config, layout, stage, dtype, device_type) for stage in range(layout.pp))
    return max(estimates, key=lambda needed: needed.total)


def link_options(config: Config, tp: int) -> dict[str, Any]:
    """What model and schedule need beyond the axes: keyword arguments of `Layout.links` and `build_process_groups`."""
    model, wraps = config.model, config.parallel.virtual_stages > 1
    return {"kv_replicas": kv_replicas(model, tp), "wraps": wraps, "tied": model.tie_embeddings}


def _links(config: Config, layout: Layout, stage: int, sizes: ActivationSizes, device_type: str) -> int:
    """Bytes of the hidden states between stages, and of the communicators of a GPU."""
    links = layout.links(layout.rank_at(Coordinates(stage, 0, 0, 0)), **link_options(config, layout.tp))
    boundary = sizes.tokens * sizes.hidden // sizes.tp * sizes.itemsize
    boundaries = _BOUNDARIES_PER_LINK * sum(link.axis in CHANNELS for link in links) * boundary
    return boundaries + (len(links) * _COMMUNICATOR if device_type == "cuda" else 0)


def _workspace(sizes: ActivationSizes, recompute: str, parts: Sequence[Part], device_type: str) -> int:
    """Temporary bytes of a layer's backward pass or of the loss, whichever is more, plus an allowance for libraries."""
    in_fp8 = any(layer in sizes.fp8_layers for part in parts for layer in part.layers)
    largest = _layer_workspace(sizes, recompute, in_fp8=in_fp8)
    if parts[-1].has_head:
        largest = max(largest, _loss_workspace(sizes, device_type))
    return largest + _ALLOWANCE[device_type]


def _layer_workspace(sizes: ActivationSizes, recompute: str, *, in_fp8: bool) -> int:
    """Recomputed activations, and the gradients at the feed-forward's activation function: of its input, and of its
    output or, in FP8, the two copies of the first. With a softcap also scores, probabilities and their gradients.

    Tensor parallelism gathers all tokens of a layer's input and of that input's gradient.
    """
    gathered = sizes.hidden if sizes.tp > 1 else 0
    recomputed = max(0, sizes.layer("none", in_fp8=in_fp8) - sizes.layer(recompute, in_fp8=in_fp8))
    second = 2 * sizes.up * sizes.fp8_itemsize / sizes.itemsize if in_fp8 else sizes.ffn
    scores = int(sizes.tokens * sizes.scores) * 4 * 4
    return int(sizes.tokens * (recomputed + sizes.up + max(second, 2 * gathered))) * sizes.itemsize + scores


def _loss_workspace(sizes: ActivationSizes, device_type: str) -> int:
    """A chunk of logits and the loss's input; on a CPU also the head's gradient and that of a chunk.

    On a GPU kernels overwrite the logits by their gradient; without them, as with a softcap, there is an fp32 copy, and
    with a softcap its slope.
    """
    tokens, rows, hidden, itemsize = sizes.tokens, sizes.vocabulary, sizes.hidden, sizes.itemsize
    chunk = min(tokens, chunk_rows(rows, device_type))
    wide = 4 if itemsize == 4 else 4 + itemsize  # fp32, and the rounded matmul output or gradient
    if sizes.softcapped:
        wide += 4
    elif device_type == "cuda":
        wide = itemsize
    if device_type == "cuda":
        return chunk * rows * wide + tokens * hidden * itemsize
    gathered = hidden if sizes.tp > 1 else 0
    gradients = 4 * rows * hidden * min(2, -(-tokens // chunk))
    return chunk * rows * wide + gradients + tokens * gathered * itemsize


def _parameters(size: int, in_fp8: int, itemsize: int, shards: int) -> int:
    """Bytes of `size` parameters, `in_fp8` of them also in FP8 and otherwise cut into `shards`."""
    return (size - in_fp8) * itemsize + in_fp8 * itemsize // shards + 2 * in_fp8


def _rounding(table: ParameterTable, parallel: ParallelConfig, dp: int) -> int:
    """Temporary bytes of gradients summed in bf16: a rounded copy of the largest bucket, or later its sum in fp32."""
    if dp == 1 or parallel.grad_reduce_dtype == "fp32":
        return 0
    shards = dp if parallel.sharded_optimizer else 1
    return max(max(2 * plan.size, 4 * plan.size // shards) for plan in plan_buckets(table, shards))


def available(device: torch.device, local_size: int) -> int:
    """Return the bytes that one rank may use: its share of its GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // ranks_per_gpu(local_size)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # limit of the container
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory // local_size

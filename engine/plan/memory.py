"""How much memory a rank will need, and how much it has.

Activations are counted as our layers keep them, in the manner of Korthikanti et al. 2022 (arXiv 2205.05198): each term
is a tensor that an operation saves for its backward pass. Rejected: running the model on tensors without data, which
would be exact and takes longer than a person waits, as `auto` looks at many layouts.

Legend: t tokens of a microbatch, h hidden size, f feed-forward size, q and kv the width of a rank's queries and of its
keys (or values), v vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch

from engine.config.derived import microbatches
from engine.config.schema import Config
from engine.model.parameters import kv_share, parameter_table
from engine.ops.cross_entropy import chunk_rows
from engine.parallel.fp8 import runs_in_fp8
from engine.parallel.layout import Layout, TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.parallel.pipeline.schedules import ActionKind, build_schedule
from engine.plan.stages import stage_parts

GIB, MIB = 1 << 30, 1 << 20
_GPU_ALLOWANCE = 2 * GIB  # CUDA context, libraries and their workspaces, communication buffers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank while training."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
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
    """The ranks of a run, all alike.

    Attributes:
        count: how many.
        per_node: how many share a node, and so the fast links between them.
        capacity: bytes of memory that each may use.
        dtype: of the weights.
    """

    count: int
    per_node: int
    capacity: int
    device_type: str
    dtype: torch.dtype


def unit_of(size: int) -> tuple[int, str]:
    """The unit in which to show `size` bytes, and its name."""
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def estimate(config: Config, layout: Layout, stage: int, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Memory of a rank of pipeline stage `stage`.

    Weights are in `dtype` and, for FP8, in 8 bits too, as they lie and transposed; gradients in fp32; moments (and
    fp32 master weights where the model is not fp32) are divided among the data-parallel ranks; activations are what
    backward passes to come will need, at the worst moment of the schedule (for FP8 those of bf16, which are more); the
    workspace is what a layer or the loss needs beside that for a moment, and on a GPU an allowance for libraries.
    """
    parts, tp = stage_parts(config, layout, stage), layout.tp
    table = parameter_table(config.model, parts, TensorParallel(0, tp))
    size = table.local_size
    in_fp8 = sum(p.size for p in table.parameters if runs_in_fp8(p, config.precision, config.model.num_layers))
    states = (0 if dtype == torch.float32 else 4) + (8 if config.optimizer.moments == "fp32" else 4)
    shards = layout.dp if config.parallel.sharded_optimizer else 1
    return MemoryEstimate(
        parameters=size * dtype.itemsize + 2 * in_fp8,
        gradients=size * 4,
        optimizer=size * states // shards,
        activations=_activations(config, layout, stage, dtype.itemsize),
        workspace=_workspace(config, tp, parts, dtype.itemsize, device_type),
    )


def estimate_fullest(config: Config, layout: Layout, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Memory of a rank of the stage that needs most."""
    estimates = (estimate(config, layout, stage, dtype, device_type) for stage in range(layout.pp))
    return max(estimates, key=lambda needed: needed.total)


def _activations(config: Config, layout: Layout, stage: int, itemsize: int) -> int:
    """Bytes that the microbatches in flight on a stage keep, at the worst moment of the schedule.

    A forward pass leaves what its backward will need. Where that is done in two parts, the first trades it for the
    factors of the weight gradients, which wait for the second.
    """
    parts, parallel, count = stage_parts(config, layout, stage), config.parallel, microbatches(config, layout.dp)
    if parallel.schedule != "gpipe":
        count = min(count, 4 * layout.pp)  # more keep no more, and many take long to look at
    actions = build_schedule(parallel.schedule, layout.pp, count, parallel.virtual_stages).actions[stage]
    kept = [_kept(config, layout.tp, part, itemsize) for part in parts]
    waiting = [_waiting(config, layout.tp, part, itemsize) for part in parts]
    change = {
        ActionKind.FORWARD: kept,
        ActionKind.BACKWARD: [-size for size in kept],
        ActionKind.BACKWARD_INPUT: [after - before for after, before in zip(waiting, kept, strict=True)],
        ActionKind.BACKWARD_WEIGHT: [-size for size in waiting],
    }
    return max(accumulate(change[action.kind][action.chunk] for action in actions))


def _kept(config: Config, tp: int, part: Part, itemsize: int) -> int:
    """Bytes that one microbatch leaves in a part, from its forward to its backward pass."""
    parallel, tokens, hidden = config.parallel, _tokens(config), config.model.hidden_size
    recomputed = 0 if parallel.recompute == "none" else len(part.layers[: parallel.recompute_layers])
    elements = recomputed * _layer_keeps(config, tp, parallel.recompute)
    elements += (len(part.layers) - recomputed) * _layer_keeps(config, tp, "none")
    if not part.has_head:
        return int(tokens * elements) * itemsize
    # the input of the final norm; and the loss computes its gradients at once: fp32 [t, h] and [v/tp, h]
    elements += hidden / tp
    return int(tokens * elements) * itemsize + 4 * hidden * (tokens + _vocabulary(config, tp))


def _waiting(config: Config, tp: int, part: Part, itemsize: int) -> int:
    """Bytes of one microbatch of a part that wait for the weight gradients: input and output gradient of each product,
    those of [t, h] for all tokens."""
    q, kv, up, ffn = _widths(config, tp)
    elements = 4 * config.model.hidden_size + (q + 2 * kv) + q + up + ffn
    return int(_tokens(config) * len(part.layers) * elements) * itemsize


def _layer_keeps(config: Config, tp: int, recompute: str) -> float:
    """Elements per token that a layer keeps."""
    stream = config.model.hidden_size / tp  # the input of each norm; its output is as large
    q, kv, up, ffn = _widths(config, tp)
    if recompute == "full":
        return stream
    if recompute == "selective":
        return 2 * stream + (q + 2 * kv) + q + up
    projected, rotated = q + 2 * kv, q + kv
    attended = 2 * q if config.data.document_mask else q  # documents are attended to one by one, and put together
    return 4 * stream + projected + rotated + _mask(config) + attended + up + ffn


def _mask(config: Config) -> float:
    """Elements per token of a layer's [s, s] mask, which a window within the sequence of s tokens needs."""
    window, length = config.model.sliding_window, config.data.seq_length
    if window is None or window >= length:
        return 0
    return length if config.data.document_mask else length / config.batch.micro


def _widths(config: Config, tp: int) -> tuple[float, float, float, float]:
    """Of a rank's queries, keys (or values), feed-forward before and after its activation function."""
    model = config.model
    q, kv = model.num_heads / tp * model.head_dim, kv_share(model, TensorParallel(0, tp))[1] * model.head_dim
    ffn = model.intermediate_size / tp
    return q, kv, (2 * ffn if model.activation == "swiglu" else ffn), ffn


def _workspace(config: Config, tp: int, parts: Sequence[Part], itemsize: int, device_type: str) -> int:
    """Bytes for a moment, of a layer's backward pass (what it computes again, the gradients inside the feed-forward) or
    of the loss (a chunk of logits, a copy of the head's gradient), whichever is more; and for libraries.

    Tensor parallelism gathers all tokens of a layer's input and of that one's gradient, and of the loss's input.
    """
    tokens, hidden = _tokens(config), config.model.hidden_size
    gathered = hidden if tp > 1 else 0
    _, _, up, ffn = _widths(config, tp)
    again = _layer_keeps(config, tp, "none") - _layer_keeps(config, tp, config.parallel.recompute)
    largest = int(tokens * (again + up + max(ffn, 2 * gathered))) * itemsize
    if parts[-1].has_head:
        rows = _vocabulary(config, tp)
        chunk = min(tokens, chunk_rows(rows, device_type))
        wide = 4 if itemsize == 4 else 4 + itemsize  # fp32, beside the product before or after it is rounded
        logits, gradient = chunk * rows * wide, 4 * rows * hidden
        # the gradient that the loss kept is gone when the backward pass comes to the layers
        largest = max(largest - gradient, logits + gradient + tokens * gathered * itemsize)
    return largest + (_GPU_ALLOWANCE if device_type == "cuda" else 0)


def _tokens(config: Config) -> int:
    return config.batch.micro * config.data.seq_length


def _vocabulary(config: Config, tp: int) -> int:
    """Rows of the vocabulary on a rank."""
    return -(-config.model.vocab_size // tp)


def available(device: torch.device, local_size: int) -> int:
    """Bytes that one rank may use: its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory // local_size

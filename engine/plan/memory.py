"""How much memory a rank will need, and how much it has."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import Config, microbatches
from engine.errors import OutOfMemoryError
from engine.ops.cross_entropy import chunk_rows
from engine.parallel.layout import Coordinates, Layout
from engine.parallel.pipeline.check import peak_activations
from engine.parallel.pipeline.partition import Part
from engine.parallel.pipeline.schedules import build
from engine.plan.stages import stage_parts, stage_table

GIB = 1 << 30


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
        return self.parameters + self.gradients + self.optimizer + self.activations + self.workspace

    def __str__(self) -> str:
        unit, name = (GIB, "GiB") if self.total >= GIB else (1 << 20, "MiB")
        parts = ("parameters", "gradients", "optimizer", "activations", "workspace")
        listed = ", ".join(f"{part} {getattr(self, part) / unit:.1f}" for part in parts)
        return f"{self.total / unit:.1f} {name} per rank ({listed})"


def estimate(config: Config, layout: Layout, stage: int, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Memory of a rank of pipeline stage `stage`.

    Weights are in `dtype`, gradients in fp32; moments (and fp32 master weights where the model is not fp32) are divided
    among the data-parallel ranks; activations are what the backward passes of all microbatches in flight will need; the
    workspace is the cross-entropy's chunk of logits and the head's gradient, on a GPU also the CUDA context and the
    communication buffers.
    """
    size = stage_table(config, layout, layout.rank_at(Coordinates(stage, 0, 0, 0))).local_size
    states = (0 if dtype == torch.float32 else 4) + (8 if config.optimizer.moments == "fp32" else 4)
    shards = layout.dp if config.parallel.sharded_optimizer else 1
    return MemoryEstimate(
        parameters=size * dtype.itemsize,
        gradients=size * 4,
        optimizer=size * states // shards,
        activations=_activations(config, layout, stage) * dtype.itemsize,
        workspace=_workspace(config, layout, stage, device_type),
    )


def estimate_fullest(config: Config, layout: Layout, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Memory of a rank of the stage that needs most."""
    estimates = (estimate(config, layout, stage, dtype, device_type) for stage in range(layout.pp))
    return max(estimates, key=lambda needed: needed.total)


def _activations(config: Config, layout: Layout, stage: int) -> int:
    """Elements that the microbatches in flight on a stage keep, at the worst moment of the schedule."""
    tokens = config.batch.micro * config.data.seq_length
    schedule = build(
        config.parallel.schedule, layout.pp, microbatches(config, layout.dp), config.parallel.virtual_stages
    )
    parts = stage_parts(config, layout, stage)
    in_flight = peak_activations(schedule)[stage]
    layers = max(_layers_elements(config, layout, part) for part in parts)
    head = 2 * config.model.hidden_size // layout.tp if parts[-1].predicts else 0
    return tokens * (in_flight * layers + head)


def _layers_elements(config: Config, layout: Layout, part: Part) -> int:
    """Elements per token that the layers of a part keep. Without recompute: the inputs and outputs of both norms, q, k, v
    before and after the rotation, the attention's output, and the feed-forward's values before and after activation."""
    model, parallel, tp = config.model, config.parallel, layout.tp
    kv = max(1, model.num_kv_heads / tp) * model.head_dim
    q = model.num_heads * model.head_dim / tp
    ffn = model.intermediate_size / tp
    up = 2 * ffn if model.activation == "swiglu" else ffn
    stream = model.hidden_size / tp
    kept = {
        "none": 4 * stream + 2 * (q + kv) + kv + q + up + ffn,
        "selective": 2 * stream + q + 2 * kv + q + up,
        "full": stream,
    }
    recomputed = (
        0 if parallel.recompute == "none" else min(parallel.recompute_layers or len(part.layers), len(part.layers))
    )
    return int(recomputed * kept[parallel.recompute] + (len(part.layers) - recomputed) * kept["none"])


def _workspace(config: Config, layout: Layout, stage: int, device_type: str) -> int:
    model, tokens = config.model, config.batch.micro * config.data.seq_length
    head = 0
    if stage == layout.pp - 1:
        rows = -(-model.vocab_size // layout.tp)
        head = 4 * 2 * (min(tokens, chunk_rows(rows, device_type)) * rows + rows * model.hidden_size)
    return head + (2 * GIB if device_type == "cuda" else 0)


def available(device: torch.device, local_size: int) -> int:
    """Bytes that one rank may use: its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory // local_size


def require_fit(needed: MemoryEstimate, capacity: int, place: str) -> None:
    """Refuse a run that cannot fit, before anything is allocated.

    Args:
        capacity: bytes that a rank has.
        place: what has them, for the message.

    Raises:
        OutOfMemoryError: with the numbers and what to change.
    """
    if needed.total <= capacity:
        return
    raise OutOfMemoryError(
        f"the run needs {needed}, and {place} has {capacity / GIB:.1f} GiB. More ranks divide the optimizer's state, a "
        "larger parallel.tp or parallel.pp the model; parallel.recompute, a smaller batch.micro or data.seq_length cut the "
        "activations. To look at the engine on a small machine, add --model.preset tiny, or run: torchrun "
        "--nproc-per-node 2 -m engine train examples/configs/tiny.yaml"
    )

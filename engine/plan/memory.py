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
    workspace is what the loss or the backward pass of a layer needs beside it for a moment, whichever is more, on a GPU
    also the CUDA context and the communication buffers.
    """
    size = stage_table(config, layout, layout.rank_at(Coordinates(stage, 0, 0, 0))).local_size
    states = (0 if dtype == torch.float32 else 4) + (8 if config.optimizer.moments == "fp32" else 4)
    shards = layout.dp if config.parallel.sharded_optimizer else 1
    return MemoryEstimate(
        parameters=size * dtype.itemsize,
        gradients=size * 4,
        optimizer=size * states // shards,
        activations=_activations(config, layout, stage, dtype.itemsize),
        workspace=_workspace(config, layout, stage, dtype.itemsize, device_type),
    )


def estimate_fullest(config: Config, layout: Layout, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Memory of a rank of the stage that needs most."""
    estimates = (estimate(config, layout, stage, dtype, device_type) for stage in range(layout.pp))
    return max(estimates, key=lambda needed: needed.total)


def _activations(config: Config, layout: Layout, stage: int, itemsize: int) -> int:
    """Bytes that the microbatches in flight on a stage keep, at the worst moment of the schedule."""
    parts, in_flight = stage_parts(config, layout, stage), _in_flight(config, layout, stage)
    kept = in_flight * max(_layers_elements(config, layout, part) for part in parts) * itemsize
    if parts[-1].predicts:  # the final norm's input, and the gradient of the whole hidden states in fp32
        hidden = config.model.hidden_size
        kept += _losses(config, in_flight) * (hidden / layout.tp * itemsize + hidden * 4)
    return int(_tokens(config) * kept)


def _tokens(config: Config) -> int:
    return config.batch.micro * config.data.seq_length


def _in_flight(config: Config, layout: Layout, stage: int) -> int:
    number, parallel = microbatches(config, layout.dp), config.parallel
    return peak_activations(build(parallel.schedule, layout.pp, number, parallel.virtual_stages))[stage]


def _losses(config: Config, in_flight: int) -> int:
    """Losses on the last stage that wait for their backward pass; all schedules but GPipe do it at once."""
    return in_flight if config.parallel.schedule == "gpipe" else 1


def _layers_elements(config: Config, layout: Layout, part: Part) -> float:
    """Elements per token that the layers of a part keep."""
    parallel, kept = config.parallel, _layer_elements(config, layout)
    recomputed = min(parallel.recompute_layers or len(part.layers), len(part.layers))
    return recomputed * kept[parallel.recompute] + (len(part.layers) - recomputed) * kept["none"]


def _layer_elements(config: Config, layout: Layout) -> dict[str, float]:
    """Elements per token that a layer keeps with each kind of recompute. Without: the inputs and outputs of both norms,
    q, k, v before and after the rotation, the attention's output, the mask of a sliding window, and the feed-forward's
    values before and after activation."""
    model, tp = config.model, layout.tp
    kv = max(1, model.num_kv_heads / tp) * model.head_dim
    q = model.num_heads * model.head_dim / tp
    ffn = model.intermediate_size / tp
    up = 2 * ffn if model.activation == "swiglu" else ffn
    stream = model.hidden_size / tp
    seq_length = config.data.seq_length
    windowed = model.sliding_window is not None and model.sliding_window < seq_length
    mask = seq_length / config.batch.micro if windowed else 0
    return {
        "none": 4 * stream + 2 * (q + kv) + kv + q + mask + up + ffn,
        "selective": 2 * stream + q + 2 * kv + q + up,
        "full": stream,
    }


def _workspace(config: Config, layout: Layout, stage: int, itemsize: int, device_type: str) -> int:
    """Bytes for a moment: of a layer's backward pass (what it computes again, the gradients inside the feed-forward,
    and with tensor parallelism all tokens of its input and of that one's gradient), or of the loss (a chunk of logits,
    the gradient of the head)."""
    model, tokens, tp = config.model, _tokens(config), layout.tp
    kept, gathered = _layer_elements(config, layout), model.hidden_size if tp > 1 else 0
    ffn = model.intermediate_size / tp
    up = 2 * ffn if model.activation == "swiglu" else ffn
    again = kept["none"] - kept[config.parallel.recompute]
    layer = tokens * (again + up + max(ffn, 2 * gathered)) * itemsize
    loss = 0.0
    if stage == layout.pp - 1:
        rows = -(-model.vocab_size // tp)
        logits = min(tokens, chunk_rows(rows, device_type)) * rows * (4 if itemsize == 4 else 4 + 2 * itemsize)
        gradients = (1 + _losses(config, _in_flight(config, layout, stage))) * rows * model.hidden_size * 4
        loss = logits + gradients + tokens * gathered * itemsize
    return int(max(layer, loss)) + (2 * GIB if device_type == "cuda" else 0)


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
        "larger parallel.tp or parallel.pp the model; parallel.recompute, a smaller batch.micro or data.seq_length cut "
        "the activations. To look at the engine on a small machine, add --model.preset tiny, or run: torchrun "
        "--nproc-per-node 2 -m engine train examples/configs/tiny.yaml"
    )

"""How much memory a rank will need, and how much it has."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import Config, ModelConfig
from engine.errors import OutOfMemoryError
from engine.ops.cross_entropy import chunk_rows
from engine.parallel.table import ParameterTable

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


def estimate(config: Config, table: ParameterTable, dp: int, dtype: torch.dtype, device_type: str) -> MemoryEstimate:
    """Memory of one rank.

    Weights are in `dtype`, gradients in fp32; fp32 moments (and master weights where the model is not fp32) are sharded
    over `dp`; activations are what the backward pass keeps of one microbatch; the workspace is the cross-entropy's
    chunk of logits and the head's gradient, on a GPU also the CUDA context and the communication buffers.
    """
    size = table.local_size
    states = 2 if dtype == torch.float32 else 3
    tokens = config.batch.micro * config.data.seq_length
    return MemoryEstimate(
        parameters=size * dtype.itemsize,
        gradients=size * 4,
        optimizer=size * 4 * states // dp,
        activations=tokens * activation_elements(config.model) * dtype.itemsize,
        workspace=_workspace(config.model, tokens, device_type),
    )


def activation_elements(model: ModelConfig) -> int:
    """Elements per token that the backward pass needs: of each layer the inputs and outputs of both norms, q, k, v, the
    attention's output and the feed-forward's inner values; of the head its input."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    inner = (3 if model.activation == "swiglu" else 2) * model.intermediate_size
    layer = 4 * model.hidden_size + heads + model.num_heads * model.head_dim + inner
    return model.num_layers * layer + 2 * model.hidden_size


def _workspace(model: ModelConfig, tokens: int, device_type: str) -> int:
    logits = min(tokens, chunk_rows(model.vocab_size, device_type)) * model.vocab_size
    head_gradient = model.vocab_size * model.hidden_size
    return 4 * (2 * logits + 2 * head_gradient) + (2 * GIB if device_type == "cuda" else 0)


def available(device: torch.device, local_size: int) -> int:
    """Bytes that one rank may use: its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory // local_size


def require_fit(needed: MemoryEstimate, device: torch.device, local_size: int) -> None:
    """Refuse a run that cannot fit, before anything is allocated.

    Raises:
        OutOfMemoryError: with the numbers and what to change.
    """
    has = available(device, local_size)
    if needed.total <= has:
        return
    place = "this GPU" if device.type == "cuda" else f"this machine with {local_size} rank(s) on it"
    raise OutOfMemoryError(
        f"the run needs {needed}, and {place} has {has / GIB:.1f} GiB per rank. More ranks shard the optimizer, a "
        "smaller batch.micro or data.seq_length cuts the activations; to look at the engine on a machine like this "
        "one, add --model.preset tiny, or run: torchrun --nproc-per-node 2 -m engine train examples/configs/tiny.yaml"
    )

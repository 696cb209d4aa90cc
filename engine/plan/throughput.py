"""Model FLOPs and peak FLOP/s of GPUs, for the MFU (model FLOPs utilization)."""

import torch

from engine.config.schema import ModelConfig
from engine.parallel.table import ParameterTable

FLOPS_FORMULA = "6 · multiplying parameters + 6 · layers · sequence · heads · head size (causal attention)"

_PEAK_BF16_TFLOPS = {  # dense, by datasheet
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


def flops_per_token(model: ModelConfig, table: ParameterTable, seq_length: float) -> float:
    """Return the forward and backward FLOPs per token of a sequence of `seq_length`; see `FLOPS_FORMULA`."""
    attention = 6 * model.num_layers * seq_length * model.num_heads * model.head_dim
    return 6 * table.num_parameters_in_flops + attention


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a GPU in TFLOP/s, or None if unknown, as on any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_BF16_TFLOPS.items() if model in name), None)

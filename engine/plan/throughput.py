"""Model FLOPs and peak FLOP/s of GPUs, for the MFU (model FLOPs utilization), and the relative time of a step."""

import torch

from engine.config.derived import microbatches
from engine.config.schema import Config, ModelConfig, ParallelConfig
from engine.model.parameters import parameter_table
from engine.parallel.layout import Layout
from engine.parallel.pipeline.schedules import build_schedule
from engine.parallel.pipeline.simulate import bubble_fraction, simulate
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
# Fitted to whole steps of llama2-7b on one H200, with 8 and with 4 microbatches (docs/measurements.md). Each microbatch
# costs 22 ms beside the time of its tokens: weights are read, fp32 gradients read and written, kernels launched.
_SECONDS_PER_PARAMETER = 0.022 / 6.74e9
_FLOPS = {"bf16": 597e12, "fp8": 828e12}  # per second, in the time of the tokens


def step_seconds(config: Config, layout: Layout) -> float:
    """Predict the time of a step on one kind of GPU, without communication: for ratios between settings of a run."""
    table, tokens = parameter_table(config.model), config.batch.micro * config.data.seq_length
    count, shards = microbatches(config.batch, layout.dp), layout.tp * layout.pp
    rate = _FLOPS["fp8" if config.precision.mode == "fp8" else "bf16"]
    passes = tokens * flops_per_token(config.model, table, config.data.seq_length) / rate
    fixed = table.num_parameters * _SECONDS_PER_PARAMETER
    return count * (passes + fixed) / shards * (1 + bubble(config.parallel, layout.pp, count))


def bubble(parallel: ParallelConfig, pp: int, num_microbatches: int) -> float:
    """Return the idle time of `pp` stages relative to their busy time."""
    if pp == 1:
        return 0.0
    return bubble_fraction(simulate(build_schedule(parallel.schedule, pp, num_microbatches, parallel.virtual_stages)))


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

"""`python -m engine check`: everything that can be known about a run without starting it."""

from pathlib import Path

import torch

from engine.checkpoint.hf_config import hf_config
from engine.config import Config
from engine.data.indexed import dataset_file
from engine.errors import ConfigError
from engine.plan.describe import describe
from engine.plan.layouts import choose_layout
from engine.plan.memory import GIB, available, estimate_fullest, require_fit
from engine.train.run import open_data, open_tokenizer


def check(config: Config, world_size: int, gpu_memory_gib: float, ranks_per_node: int) -> None:
    """Validate `config` for `world_size` ranks and print layout, who holds what, memory, batch and steps.

    Files that are not on this machine are named, and are no error: the check may run elsewhere than the run.

    Args:
        gpu_memory_gib: memory of each GPU of the run.
        ranks_per_node: GPUs of each node of the run.

    Raises:
        ConfigError: no such layout or batch, or model and tokenizer do not fit together.
        DataError: data that are here do not fit the run.
        OutOfMemoryError: the run does not fit in the GPUs' memory.
    """
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: expected at least 1")
    on_cpu = config.precision.mode == "fp32" or config.run.device == "cpu"
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    local_size = min(world_size, ranks_per_node)
    device_type = "cpu" if on_cpu else "cuda"
    capacity = available(torch.device("cpu"), local_size) if on_cpu else int(gpu_memory_gib * GIB)
    hf_config(config.model, dtype=dtype, bos_id=None, eos_id=None)
    layout, reason = choose_layout(config, world_size, local_size, capacity, dtype, device_type)
    for line in describe(config, layout, reason, dtype, device_type):
        print(line)
    where = "this machine's memory" if on_cpu else f"GPUs of {gpu_memory_gib:g} GiB (--gpu-memory-gib)"
    print(f"assumed     {str(dtype).removeprefix('torch.')} on {device_type}, {where}, {local_size} rank(s) a node")
    missing = _missing_files(config)
    for path in missing:
        print(f"data        {path} is not on this machine and not checked")
    if not missing:
        tokenizer = open_tokenizer(config)
        for part in ("train", "valid") if config.train.eval_steps else ("train",):
            print(f"data        {open_data(config, part, tokenizer).num_tokens:,} tokens to {part}")
    require_fit(estimate_fullest(config, layout, dtype, device_type), capacity, "each rank")
    print("ok")


def _missing_files(config: Config) -> list[Path]:
    tokenizer = [] if config.data.tokenizer == "byte" else [Path(config.data.tokenizer)]
    paths = tokenizer + [dataset_file(dataset.path, "idx") for dataset in config.data.train]
    return [path for path in paths if not path.exists()]

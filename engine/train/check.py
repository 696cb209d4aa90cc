"""`python -m engine check`: everything that can be known about a run without starting it."""

from pathlib import Path

import torch

from engine.checkpoint.hf_config import hf_config
from engine.config import Config
from engine.data.indexed import dataset_file
from engine.errors import ConfigError
from engine.model.parameters import parameter_table
from engine.plan.memory import estimate
from engine.train.run import describe, open_data, open_tokenizer


def check(config: Config, world_size: int) -> None:
    """Validate `config` for `world_size` ranks and print layout, parameters, memory, batch and steps.

    Files that are not on this machine are named, and are no error: the check may run elsewhere than the run.

    Raises:
        ConfigError: the batch cannot be cut for so many ranks, or model and tokenizer do not fit together.
        DataError: data that are here do not fit the run.
    """
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: expected at least 1")
    on_cpu = config.precision.mode == "fp32" or config.run.device == "cpu"
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    device_type = "cpu" if on_cpu else "cuda"
    hf_config(config.model, dtype=dtype, bos_id=None, eos_id=None)
    table = parameter_table(config.model)
    memory = estimate(config, table, world_size, dtype, device_type)
    for line in describe(config, table, world_size, memory):
        print(line)
    print(f"assumed     {str(dtype).removeprefix('torch.')} on {device_type}")
    missing = _missing_files(config)
    for path in missing:
        print(f"data        {path} is not on this machine and not checked")
    if not missing:
        tokenizer = open_tokenizer(config)
        for part in ("train", "valid") if config.train.eval_steps else ("train",):
            print(f"data        {open_data(config, part, tokenizer).num_tokens:,} tokens to {part}")
    print("ok")


def _missing_files(config: Config) -> list[Path]:
    tokenizer = [] if config.data.tokenizer == "byte" else [Path(config.data.tokenizer)]
    paths = tokenizer + [dataset_file(dataset.path, "idx") for dataset in config.data.train]
    return [path for path in paths if not path.exists()]

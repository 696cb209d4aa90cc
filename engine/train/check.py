"""`python -m engine check`: everything that can be known about a run without starting it."""

import torch

from engine.config import Config
from engine.data.indexed import dataset_file
from engine.errors import ConfigError
from engine.model.parameters import parameter_table
from engine.plan.memory import estimate
from engine.train.run import describe


def check(config: Config, world_size: int) -> None:
    """Validate `config` for `world_size` ranks and print layout, parameters, memory, batch and steps.

    Files that are not on this machine are named, and are no error: the check may run elsewhere than the run.

    Raises:
        ConfigError: the batch cannot be cut for so many ranks.
    """
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: expected at least 1")
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    table = parameter_table(config.model)
    for line in describe(config, table, world_size, estimate(config, table, world_size, dtype)):
        print(line)
    for dataset in config.data.train:
        there = dataset_file(dataset.path, "idx").exists()
        print(f"data        {dataset.path} {'is here' if there else 'is not on this machine'}")
    print("ok")

"""`triaxis check`: validate a configuration and print its plan, without starting the run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.checkpoint.huggingface.config import require_expressible
from engine.cli.arguments import require_at_least
from engine.cli.settings import config_parser, load_config
from engine.config.derived import with_steps
from engine.config.schema import Config
from engine.data.samples.dataset import SampleDataset
from engine.data.samples.sample import Split
from engine.data.storage.format import dataset_file
from engine.data.tokenizers.protocol import Tokenizer
from engine.formatting import counted, did_you_mean
from engine.plan.describe import describe_run
from engine.plan.layouts import choose_layout, require_fit
from engine.plan.memory import GIB, ClusterSpec, available
from engine.plan.microbatch import describe_microbatches
from engine.train.inputs import describe_data, open_data, open_tokenizer

DESCRIPTION = "Validate a configuration and print its layout, memory and steps, without starting the run; needs no GPU."
EXAMPLES = """
examples:
  %(prog)s llama2-7b --gpus 8 --nodes 8
  %(prog)s llama2-7b --gpus 8 --gpu-memory-gib 40 --parallel.recompute full
  %(prog)s tiny
"""


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = config_parser("check", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("--gpus", "--ranks", type=int, default=1, metavar="N", help="GPUs or ranks of each node (default 1)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the run (default 1)")
    add("--gpu-memory-gib", type=float, default=80, metavar="N", help="memory per GPU (default 80)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    options, overrides = parser().parse_known_args(arguments)
    config = load_config(options.config, overrides)
    check_run(config, options.gpus, options.nodes, options.gpu_memory_gib)


def check_run(config: Config, gpus: int, nodes: int, gpu_memory_gib: float) -> None:
    """Validate `config` for `gpus` ranks on each of `nodes` nodes, and print layout, pipeline stages, memory, batch,
    steps and microbatch sizes.

    Missing files are reported but are not an error, as the check may run on another machine than the training.

    Args:
        gpu_memory_gib: memory of each GPU of the run.

    Raises:
        ConfigError: no layout or batch works, or model and tokenizer do not match.
        DataError: the data on this machine do not match the run.
        OutOfMemoryError: the run does not fit in the GPUs' memory.
    """
    require_at_least(1, gpus=gpus, nodes=nodes)
    ranks = _ranks(config, gpus, nodes, gpu_memory_gib)
    require_expressible(config.model)
    layout, reason = choose_layout(config, ranks)
    missing = _missing_files(config)
    tokenizer = None if missing else open_tokenizer(config.data.tokenizer, config.model.vocab_size)
    opened = [] if tokenizer is None else _open(config, tokenizer)
    config = with_steps(config, opened[0].num_rows if opened else None) if opened or config.train.steps else config
    print(f"assumed     {_assumed(ranks, gpu_memory_gib)}")
    for line in describe_run(config, layout, reason, ranks.dtype, ranks.device_type):
        print(line)
    for line in describe_microbatches(config, layout, ranks):
        print(line)
    for path in missing:
        ending = path.with_suffix("").suffix
        hint = f" (data.train takes it without {ending})" if ending in (".bin", ".idx") else ""
        print(f"data        {path} is not on this machine, so it is not checked{hint or _similar_file(path)}")
    if tokenizer is not None:
        valid = opened[1] if len(opened) > 1 else None
        for line in describe_data(config, opened[0], valid, tokenizer):
            print(line)
    require_fit(config, layout, ranks)
    print(f"not checked: {counted(len(missing), 'file')} not on this machine; the rest is ok" if missing else "ok")


def _ranks(config: Config, gpus: int, nodes: int, gpu_memory_gib: float) -> ClusterSpec:
    """Describe the ranks of the run; CPU ranks are assumed to be on this machine."""
    on_cpu = config.precision.mode == "fp32" or config.run.device == "cpu"
    capacity = available(torch.device("cpu"), gpus) if on_cpu else int(gpu_memory_gib * GIB)
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    return ClusterSpec(gpus * nodes, gpus, capacity, "cpu" if on_cpu else "cuda", dtype)


def _assumed(ranks: ClusterSpec, gpu_memory_gib: float) -> str:
    """Describe the machines that the plan is for, with the options that change them."""
    dtype, here = str(ranks.dtype).removeprefix("torch."), torch.cuda.device_count()
    nodes = f"{dtype}, {counted(ranks.count // ranks.per_node, 'node')} (--nodes) with"
    if ranks.device_type == "cpu":
        return f"{nodes} {counted(ranks.per_node, 'rank')} each (--ranks) and this machine's memory"
    found = f"this machine has {counted(here, 'GPU') if here else 'none'}"
    return (
        f"{nodes} {counted(ranks.per_node, 'GPU')} each (--gpus) of {gpu_memory_gib:g} GiB (--gpu-memory-gib); {found}"
    )


def _open(config: Config, tokenizer: Tokenizer) -> list[SampleDataset]:
    """Open the training data and, if the run evaluates, the validation data."""
    parts: list[Split] = ["train", "valid"] if config.train.eval_steps else ["train"]
    return [open_data(config, part, tokenizer) for part in parts]


def _missing_files(config: Config) -> list[Path]:
    tokenizer = [] if config.data.tokenizer == "byte" else [Path(config.data.tokenizer)]
    paths = tokenizer + [dataset_file(dataset.path, "idx") for dataset in [*config.data.train, *config.data.valid]]
    return [path for path in paths if not path.exists()]


def _similar_file(path: Path) -> str:
    """Suggest a file beside `path`: one whose name continues its name, as those of `preprocess` do, or is close."""
    name = path.name.removesuffix(".idx")
    names = [file.name.removesuffix(".idx") for file in path.parent.glob(f"*{path.suffix}")]
    longer = [near for near in names if near.startswith(f"{name}_")]
    return did_you_mean(min(longer, default=name), names)

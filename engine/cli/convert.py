"""Convert a Hugging Face directory into a run directory, or a run or checkpoint into a Hugging Face directory.

Which way is seen from the input. Memory is bounded by one tensor, whatever the model's size.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.huggingface.importing import import_directory
from engine.checkpoint.run_directory import BEST, open_checkpoint
from engine.data.tokenizers.tokenizer import CHAT_TEMPLATE, load_tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.model.parameters import logical_shapes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ProgressLines:
    """A line every few seconds: tensors, speed and the time that is left."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._num_tensors = len(shapes)
        self._total = sum(map(math.prod, shapes.values()))
        self._tensors = self._elements = 0
        self._start = self._last = time.monotonic()

    def __call__(self, name: str, elements: int) -> None:
        self._tensors += 1
        self._elements += elements
        if time.monotonic() - self._last >= 2:
            self._last = time.monotonic()
            left = (self._total - self._elements) * (self._last - self._start) / self._elements
            done = f"{self._tensors}/{self._num_tensors} tensors"
            print(f"{done}, {self.speed()}, ETA {left:.0f} s", file=sys.stderr, flush=True)

    def speed(self) -> str:
        """Gigabytes of fp32 values per second."""
        return f"{self._elements * 4 / 1e9 / max(1e-9, time.monotonic() - self._start):.2f} GB/s"

    def summary(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{self._tensors} tensors, {self._total:,} parameters in {seconds:.1f} s ({self.speed()} of fp32 values)"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR", help="what to convert")
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the exported weights (default bf16); imports keep fp32 masters"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    source: Path = options.source
    best = source.name == BEST and source.parent.is_dir()
    if not source.is_dir() and not best:
        raise CheckpointError(f"no such directory: --from {source}")
    inside = best or source.name == "checkpoints" or source.name.startswith("step_")
    if inside or (source / "manifest.json").exists() or (source / "checkpoints").exists():
        export_checkpoint(source, options.target, DTYPES[options.dtype or "bf16"])
    elif (source / "config.json").exists():
        if options.dtype:
            raise ConfigError(f"--dtype {options.dtype} is for exports; an import always keeps fp32 master weights")
        import_model(source, options.target)
    else:
        raise CheckpointError(
            f"--from {source} is neither a Hugging Face directory (config.json), nor a run directory (checkpoints/), "
            "nor a checkpoint (manifest.json)"
        )


def import_model(source: Path, target: Path) -> None:
    directory = HuggingFaceDirectory(source)
    shapes = logical_shapes(directory.model)
    directory.require(shapes)
    for name in directory.ignored:
        print(f"not used: {name}")
    if not directory.tokenizer_files:
        print(f"no tokenizer files in {source}: text generation will need them")
    progress = ProgressLines(shapes)
    checkpoint = import_directory(directory, target, shapes, progress)
    print(f"imported {progress.summary()}")
    print(f"from {source} ({directory.model.family}) into {checkpoint}")
    print(f"generate:  python tools/generate.py {target} --prompt 'Once upon a time'")
    print(f"train on:  set run.resume to {target} in a configuration with the model section of")
    print(f"           {checkpoint / 'config.yaml'}")


def export_checkpoint(source: Path, target: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(source)
    model = checkpoint.model
    shapes = logical_shapes(model)
    spec = checkpoint.tokenizer_spec
    tokenizer = load_tokenizer(spec, fast=False) if spec else None
    if tokenizer is None:
        print(f"{checkpoint.path} holds no tokenizer: none is exported")
    progress = ProgressLines(shapes)
    export(checkpoint, tokenizer, target, shapes, dtype=dtype, progress=progress)
    print(f"exported {progress.summary()}, read back and verified")
    state, kind = checkpoint.state, str(dtype).removeprefix("torch.")
    print(f"from {checkpoint.path} (step {state.step}) into {target} as {model.family}, {kind}")
    if state.best is not None and state.best.step != state.step:
        print(f"the best evaluation was at step {state.best.step}: --from {checkpoint.path.parent / BEST}")
    chat = "--chat" if (target / CHAT_TEMPLATE).exists() else "--prompt 'Once upon a time'"
    print(f"generate:  python tools/generate.py {target} {chat}")

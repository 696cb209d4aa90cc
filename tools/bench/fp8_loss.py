"""Compare the loss of FP8 training with bf16: every recipe on one and two tensor-parallel ranks, and other seeds.

Each row is a complete training run on this machine (FP8 is emulated on a CPU) of the quickstart's model on the
quickstart's corpus, with the same tokens in the same order. The mean loss over the last tenth of the steps is compared.
bf16 runs with other seeds show the noise level. The program fails if a recipe deviates by more than 0.5 %.

    bash examples/quickstart.sh                            # creates the corpus
    python tools/bench/fp8_loss.py --output docs/fp8.md
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError, TriaxisError, run_program
from engine.formatting import duration
from engine.testing.runs import read_records

TOLERANCE = 0.005
RECIPES = ("tensorwise", "delayed", "blockwise")
DATA = Path("data/quickstart/stdlib_text_document.idx")
SEEDS = (1, 2, 3)  # all comparisons use the first one
LR = 1e-3  # a quarter of the quickstart's, at which runs diverge by rounding alone
NUM_LAYERS, BATCH_SIZE = 4, 8  # both twice the quickstart's
CONFIG = Path("examples/configs/quickstart.yaml")  # has paths relative to the repository root


@dataclass(frozen=True)
class Run:
    """A training run, one row of the table: recipe, tensor-parallel size and seed."""

    recipe: str | None  # None: bf16
    tp: int
    seed: int = SEEDS[0]

    @property
    def name(self) -> str:
        return f"{'bf16' if self.recipe is None else f'fp8 {self.recipe}'}, tp {self.tp}, seed {self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = _parser().parse_args(arguments)
    if options.output and not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: no such directory: {options.output.parent}")
    if not CONFIG.exists() or not DATA.exists():
        raise ConfigError(f"{CONFIG} or {DATA} not found; run from the repository root, after the quickstart")
    started = time.perf_counter()
    runs = [Run(None, 1, seed) for seed in SEEDS] + [Run(None, 2)]
    runs += [Run(recipe, tp) for tp in (1, 2) for recipe in RECIPES]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(options.at_a_time) as pool:
        losses = dict(zip(runs, pool.map(lambda run: _tail_loss(run, options, Path(directory)), runs), strict=True))
    page = _page(losses, options, sys.argv[1:] if arguments is None else arguments, time.perf_counter() - started)
    print(page)
    expected = losses[runs[0]]
    if wrong := [run.name for run in runs if run.recipe and abs(losses[run] / expected - 1) > TOLERANCE]:
        raise TriaxisError(f"more than {TOLERANCE:.1%} from bf16: {'; '.join(wrong)}; nothing was written")
    if options.output:
        options.output.write_text(page, encoding="utf-8")
        print(f"written: {options.output}")


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n    ")
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0],
        epilog=f"examples:\n    {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--at-a-time", type=int, default=2, metavar="N", help="concurrent runs (default 2)")
    parser.add_argument("--machine", default="this machine", help="description of the machine on the page")
    parser.add_argument("--output", type=Path, help="write the page here")
    return parser


def _tail_loss(run: Run, options: argparse.Namespace, directory: Path) -> float:
    mode = ["bf16"] if run.recipe is None else ["fp8", "--precision.recipe", run.recipe]
    overrides: dict[str, Any] = {
        "run.dir": directory / run.name.replace(" ", "-").replace(",", ""),
        "run.seed": run.seed,
        "optimizer.lr": LR,
        "lr_schedule.min_lr": LR / 10,
        "model.num_layers": NUM_LAYERS,
        "batch.micro": 4,
        "batch.global": BATCH_SIZE,
        "parallel.tp": run.tp,
        "parallel.pp": 1,
        "data.seq_length": 128,
        "train.steps": options.steps,
        "train.eval_steps": 0,
        "log.interval": 1,
    }
    flags = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.tp)]
    command += ["-m", "engine", "train", str(CONFIG), "--precision.mode", *mode, *flags]
    started = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise TriaxisError(f"{run.name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    losses = [record["loss"] for record in read_records(overrides["run.dir"] / "metrics.jsonl") if "loss" in record]
    tail = statistics.mean(losses[-max(1, options.steps // 10) :])
    print(f"{run.name}: {tail:.4f} ({duration(time.perf_counter() - started)})", file=sys.stderr)
    return tail


def _page(losses: dict[Run, float], options: argparse.Namespace, arguments: Sequence[str], took: float) -> str:
    expected = losses[Run(None, 1)]
    noise = statistics.stdev(losses[Run(None, 1, seed)] for seed in SEEDS) / expected
    lines = [
        "# FP8 compared with bf16",
        "",
        f"`python tools/bench/fp8_loss.py {shlex.join(arguments)}` ({options.machine}; torch {torch.__version__}; took "
        f"{duration(took)}). This page is the program's output.",
        "",
        f"{options.steps} steps of {BATCH_SIZE} × 128 tokens of the quickstart's model, with {NUM_LAYERS} layers, on "
        f"the quickstart's corpus, learning rate {LR:g}. Loss: mean of the last {max(1, options.steps // 10)} steps. "
        "FP8 is emulated: every rounding of a GPU's matmul except that of its accumulator.",
        f"Between seeds the loss of bf16 varies by {noise:.2%} (standard deviation of {len(SEEDS)}).",
        "",
        "| run | loss | difference from bf16 |",
        "|---|---|---|",
    ]
    lines += [f"| {run.name} | {loss:.4f} | {loss / expected - 1:+.2%} |" for run, loss in losses.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_program(main)

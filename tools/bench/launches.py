"""Count the kernel launches of a training step without a GPU: what launches them, and from where.

    python tools/bench/launches.py
    python tools/bench/launches.py --preset llama2-7b --recipe delayed --microbatches 8 --top 20

The step is that of `engine train` at its real shapes, on the meta device; see engine/testing/launches.py, which says
how many launches an operator has. Settings of a run (`--section.key VALUE`) can follow.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.config.load import resolve
from engine.config.schema import Config
from engine.errors import run_program
from engine.model.families import PRESETS
from engine.testing.launches import Launches, step_launches

RECIPES = ("bf16", "tensorwise", "delayed", "blockwise")


def main() -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=PRESETS, default="llama2-7b")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=RECIPES, help="bf16, or a recipe of FP8")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N")
    parser.add_argument("--seq-length", type=int, default=4096, metavar="N")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="lines of each table (default: 12)")
    args, overrides = parser.parse_known_args()
    for recipe in args.recipe:
        config = launch_config(args.preset, recipe, args.microbatches, args.seq_length, overrides)
        print("\n".join(table(recipe, config, step_launches(config), args.top)), flush=True)


def launch_config(
    preset: str, recipe: str, microbatches: int, seq_length: int, overrides: Sequence[str] = ()
) -> Config:
    """Configure a step of `microbatches` sequences on one GPU, in bf16 or in FP8 with moments in bf16."""
    raw: dict[str, Any] = {
        "model": {"preset": preset},
        "precision": {"mode": "bf16"} if recipe == "bf16" else {"mode": "fp8", "recipe": recipe},
        "optimizer": {"moments": "fp32" if recipe == "bf16" else "bf16"},
        "data": {
            "tokenizer": "byte",
            "train": [{"path": "unused"}],
            "seq_length": seq_length,
            "document_mask": False,
        },
        "batch": {"micro": 1, "global": microbatches},
        "train": {"steps": 1},
    }
    return resolve(raw, overrides, presets=PRESETS, source="the benchmark")


def table(recipe: str, config: Config, launches: Launches, top: int) -> list[str]:
    """The lines that show the operators and places with the most launches."""
    passes = config.model.num_layers * (config.batch.global_ // config.batch.micro)
    lines = [f"{recipe}: {launches.total():,} launches a step", f"{'a step':>9} {'a layer and microbatch':>24}"]
    for (operator, place), count in launches.most_common(top):
        lines.append(f"{count:9,} {count / passes:24.2f}  {operator} from {place}")
    rest = launches.total() - sum(count for _, count in launches.most_common(top))
    return [*lines, f"{rest:9,} {rest / passes:24.2f}  others"]


if __name__ == "__main__":
    run_program(main)

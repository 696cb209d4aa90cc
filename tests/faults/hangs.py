"""The campaign of hangs: `python tests/faults/hangs.py [--rounds N] [--limit S]` gets ranks stuck and prints a table.

Each round gets one rank of a small run stuck, or dead, in each way, at random in a random layout, and checks that the
run ended within the limit + 2 s, on all ranks, and that the one report names the right rank.
"""

import argparse
import random
import tempfile
from collections import defaultdict
from pathlib import Path

from engine.errors import run_program
from engine.testing.runs import run_config, write_dataset
from engine.testing.stuck import FAULT_KINDS, End, run_stuck

LAYOUTS = ((2, []), (2, ["--parallel.tp", "2"]), (2, ["--parallel.pp", "2"]), (4, ["--parallel.tp", "2"]))
DEATHS = ("killed", "crash")  # not hangs: the others are told at once
SPARE_S = 2.0
AHEAD_S = 4.0  # for which readers that are stopped have read ahead


def one(kind: str, limit_s: float, generator: random.Random) -> tuple[End, int, str]:
    """Run once; return how it ended, the rank to blame and the layout."""
    ranks, layout = generator.choice([place for place in LAYOUTS if kind != "skip" or place == LAYOUTS[0]])
    ranks = 4 if kind == "skip" else ranks
    rank, step = generator.randrange(ranks), generator.randint(2, 6)
    options = [*layout, "--parallel.hang_s", str(limit_s), "--checkpoint.interval", "4", "--batch.global", "8"]
    options += ["--data.num_workers", "1"] if kind == "reader" else []
    with tempfile.TemporaryDirectory() as directory:
        write_dataset(Path(directory) / "corpus")
        end = run_stuck(run_config(Path(directory), *options, steps=60), ranks, kind, rank, step)
    return end, rank, f"{ranks} ranks {' '.join(layout) or 'dp'}"


def verdict(kind: str, end: End, rank: int, limit_s: float) -> str:
    """What is wrong with the end, or an empty string."""
    said = " ".join(end.reports) if kind != "crash" else end.codes
    blamed = f"rank {rank} (" if kind in DEATHS else f"no progress for {limit_s:.3g} s: rank {rank} ("
    if blamed not in said:
        return f"blames another rank: {said[:300]}"
    if kind != "crash" and len(end.reports) != 1:
        return f"{len(end.reports)} reports"
    if "has not finished" in end.codes:
        return "a rank has not ended"
    within = 5.0 if kind in DEATHS else limit_s + SPARE_S + AHEAD_S * (kind == "reader")
    return "" if end.seconds <= within else f"took {end.seconds:.1f} s"


def main() -> int:
    """Run the campaign; returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=2.0, help="parallel.hang_s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator, seconds, wrong = random.Random(options.seed), defaultdict(list), defaultdict(list)
    for _ in range(options.rounds):
        for kind in FAULT_KINDS:
            end, rank, place = one(kind, options.limit, generator)
            seconds[kind].append(end.seconds)
            if problem := verdict(kind, end, rank, options.limit):
                wrong[kind].append(problem)
                print(f"{kind}, {place}, rank {rank}: {problem}", flush=True)
    print("| fault | runs | right rank, one report, in time | median s | most s |\n|---|---|---|---|---|")
    for kind, took in seconds.items():
        good = len(took) - len(wrong[kind])
        print(f"| {kind} | {len(took)} | {good} | {sorted(took)[len(took) // 2]:.1f} | {max(took):.1f} |")
    return int(any(wrong.values()))


if __name__ == "__main__":
    run_program(main)

"""Report of the parity campaign: a summary, a table per preset, and the effect of rounding alone."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.formatting import duration
from engine.testing.parity import STEPS, TOLERANCES, Case, Deviation, Problem
from engine.testing.parity_cases import SIZES, grids

Rounded = tuple[str, dict[str, Any], Deviation]  # preset, changed settings, deviation
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """Result of a case."""

    problem: Problem
    case: Case
    deviation: Deviation
    torn: list[str]

    @property
    def problems(self) -> list[str]:
        found = self.deviation.problems() + [f"ranks differ in {name}" for name in self.torn]
        return [f"{self.problem.preset}, {self.case}: {text}" for text in found]


def report(rows: Sequence[Row], rounded: Sequence[Rounded], options: argparse.Namespace, seconds: float) -> str:
    """Render the page docs/parity.md.

    Args:
        rounded: deviations by rounding alone, for each preset and set of changed settings.
        options: options of the program.
        seconds: duration of the campaign.
    """
    by_preset = {preset: [row for row in rows if row.problem.preset == preset] for preset in options.presets}
    summary = [f"| {preset} | {len(of)} | " + " | ".join(largest(of)) + " |" for preset, of in by_preset.items()]
    alone = [f"| {preset} | {_settings(changed)} | {_cells(found)} |" for preset, changed, found in rounded]
    sections = [
        "\n".join(
            [f"\n## {preset}\n", TABLE_HEADER, *(f"| {_describe(row.case)} | {_cells(row.deviation)} |" for row in of)]
        )
        for preset, of in by_preset.items()
    ]
    return PAGE.format(
        command=shlex.join(["python", "tools/parity.py", *sys.argv[1:]]),
        place=f"{options.machine}; {_commit()}; torch {torch.__version__}; took {duration(seconds)}",
        steps=STEPS,
        tolerances=", ".join(f"{name} {value:.0e}" for name, value in TOLERANCES.items()),
        ranks=options.ranks,
        admitted=len(grids(options.ranks)),
        grids=len(SIZES) ** 3 - 1,
        summary="\n".join(summary),
        rounding="\n".join(alone),
        sections="\n".join(sections),
    )


def largest(rows: Sequence[Row]) -> list[str]:
    """Format the largest deviations of several rows: loss, gradient norm, parameters."""
    found = [(row.deviation.loss, row.deviation.grad_norm, row.deviation.parameters) for row in rows]
    return [f"{max(values):.1e}" for values in zip(*found, strict=True)]


def _cells(found: Deviation) -> str:
    worst = found.worst.removeprefix("model.")
    return f"{found.loss:.1e} | {found.grad_norm:.1e} | {found.parameters:.1e} | {worst}"


def _describe(case: Case) -> str:
    """Format layout, schedule and options as table cells."""
    parallel = case.parallel
    layout = _layout(case) if case.after is None else f"{_layout(case.after)} then {_layout(case)}"
    recomputed = "" if parallel.recompute == "none" else f"recompute {parallel.recompute}"
    options = [
        recomputed + f" in {parallel.recompute_layers} layer" * (parallel.recompute_layers is not None),
        f"layers {'-'.join(map(str, parallel.layers_per_stage))}" if parallel.layers_per_stage else "",
        "" if parallel.sharded_optimizer else "not sharded",
        "small buckets" if case.bucket_size else "",
    ]
    schedule = parallel.schedule if parallel.pp != 1 else ""
    return f"{layout} | {schedule} | {', '.join(filter(None, options))}"


def _layout(case: Case) -> str:
    sizes = {"tp": case.parallel.tp, "pp": case.parallel.pp, "dp": case.dp}
    return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size != 1)


def _settings(changed: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "nothing"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


TABLE_HEADER = """\
| layout | schedule | options | loss | gradient norm | parameters | worst tensor |
|---|---|---|---|---|---|---|"""

PAGE = """\
# Parity

`{command}` ({place}). This page is the program's output; `tests/parallel/test_parity.py` holds a smaller table in CI.

Each row is a training run of {steps} steps on gloo ranks in fp32, from `train` to the checkpoint, compared with the
run of a single process: the largest relative deviation of a loss (of each step and of three evaluations) and of a
gradient norm, and the relative L2 of the logical tensor that deviates most. Tolerances: {tolerances}.
At every step, all ranks that hold the same part of a tensor held the same bits; so did the tied embeddings of the first
and the last stage. The vocabulary has 257 entries, which no tp divides; 4 tensor-parallel ranks share 2 key and value
heads in pairs.

Every grid of tp, pp and dp in 1, 2, 4 with at most {ranks} ranks ({admitted} of {grids}; the others were not run) ran
with every schedule, with and without a sharded optimizer. The kinds of recompute alternate, so that each combination
ran with every kind in one of the four families. "a then b": half of the steps in layout a, the rest in layout b,
resumed from a's checkpoint.

| preset | runs | loss | gradient norm | parameters |
|---|---|---|---|---|
{summary}

## Rounding only

One process compared with itself, with all sequences of a step in one microbatch instead of one in each: the least
deviation that a layout can be expected to have. It also shows why the runs use larger initial weights
(`model.init_std` 0.1) and a larger `optimizer.eps` (1e-4) than usual. With 0.02 the embedding of a rare token comes
close to zero after a few steps, and its norm layer multiplies rounding errors. With 1e-8 Adam amplifies the rounding
errors of those elements of a key bias whose rotary frequency is so low that they hardly affect softmax.

| preset | changed | loss | gradient norm | parameters | worst tensor |
|---|---|---|---|---|---|
{rounding}
{sections}
"""

"""The parity campaign: many layouts against one process, every family, and a table of what they deviate by.

Each row is a complete training run on real ranks (gloo, fp32), compared with the run of a single process;
engine/testing/parity.py says how. The program fails when a tolerance is exceeded.

    python tools/parity.py --output docs/parity.md
    python tools/parity.py --ranks 4 --presets tiny-qwen2
"""

import argparse
import itertools
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.config.schema import ParallelConfig
from engine.errors import ConfigError, TriaxisError
from engine.formatting import duration
from engine.parallel.pipeline.schedules import INTERLEAVED, SCHEDULES
from engine.testing.parity import STEPS, TOLERANCES, Case, Deviation, Outcome, Problem, deviation, measure

Grid = tuple[int, int, int]  # tp, pp, dp
Rounded = tuple[str, dict[str, Any], Deviation]  # preset, changed settings, what came of it
ROOT = Path(__file__).parents[2]
SIZES = (1, 2, 4)  # of each axis
PROBLEMS: dict[str, dict[str, Any]] = {
    "tiny": {"batch.global": 8, "train.z_loss": 1e-2},
    "tiny-qwen2": {"batch.global": 12},
    "tiny-qwen3": {"batch.global": 8, "data.document_mask": False},
    "tiny-starcoder2": {"batch.global": 12, "train.z_loss": 1e-3, "model.sliding_window": 12},
}
# Microbatches of a rank, by sequences in a step and pipeline stages: multiples of the stages, and others. Where data
# parallelism leaves fewer, as many as there are.
MICROBATCHES = {8: {1: 2, 2: 4, 4: 4}, 12: {1: 2, 2: 3, 4: 6}}
RECOMPUTE: list[dict[str, Any]] = [
    {},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "full", "recompute_layers": 1},
]
HARSH: list[dict[str, Any]] = [{}, {"model.init_std": 0.02}, {"optimizer.eps": 1e-8}]
SMALL_BUCKET = 10_000  # elements: about a bucket a layer
AT_A_TIME = 8  # cases in one set of processes


@dataclass(frozen=True)
class Row:
    """A case, measured."""

    problem: Problem
    case: Case
    deviation: Deviation
    torn: list[str]

    @property
    def problems(self) -> list[str]:
        found = self.deviation.problems() + [f"ranks differ in {name}" for name in self.torn]
        return [f"{self.problem.preset}, {self.case}: {text}" for text in found]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.ranks < 2:
        raise ConfigError(f"--ranks {options.ranks}: layouts have at least 2 ranks")
    if options.output and not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no directory {options.output.parent}")
    started = time.perf_counter()
    rows = _measure_all(plan(options.presets, options.ranks))
    if failed := [text for row in rows for text in row.problems]:
        raise TriaxisError("\n  ".join([f"{len(failed)} deviations out of tolerance; nothing is written:", *failed]))
    print(f"{len(rows)} runs agree with one process")
    if options.output:
        text = report(rows, rounding(options.presets), options, time.perf_counter() - started)
        options.output.write_text(text, encoding="utf-8")
        print(f"written: {options.output}")


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n    ")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n    {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="the most that a layout may have (default 8)")
    add("--presets", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="PRESET", help=", ".join(PROBLEMS))
    add("--output", type=Path, metavar="FILE", help="write the table here, as Markdown")
    add("--machine", default=_machine(), help="where this runs, in words (default: %(default)s)")
    return parser


def grids(ranks: int) -> list[Grid]:
    """Every grid of the sizes that has more than one rank and at most `ranks`."""
    return [(tp, pp, dp) for tp in SIZES for pp in SIZES for dp in SIZES if 1 < tp * pp * dp <= ranks]


def plan(presets: Sequence[str], ranks: int) -> list[tuple[Problem, list[Case]]]:
    """What to run: every grid with every schedule, sharded and not, and resumes from one layout in another.

    Kinds of recomputation take turns, so that each of these combinations meets every kind in one of the four families.
    """
    found: dict[tuple[str, int], list[Case]] = {}
    for family, preset in enumerate(presets):
        sequences = PROBLEMS[preset]["batch.global"]
        for number, (grid, options) in enumerate(_combinations(ranks)):
            recompute = RECOMPUTE[(number + family) % len(RECOMPUTE)]
            case = _case(grid, sequences, SMALL_BUCKET if number % 2 else None, **options, **recompute)
            found.setdefault((preset, 6 if "layers_per_stage" in options else 4), []).append(case)
        found[preset, 4] += [case for case in _resumes(sequences) if max(case.ranks, _ranks(case.after)) <= ranks]
    return [
        (Problem(preset, PROBLEMS[preset] | {"model.num_layers": layers}), cases)
        for (preset, layers), cases in found.items()
    ]


def _combinations(ranks: int) -> Iterator[tuple[Grid, dict[str, Any]]]:
    for grid in grids(ranks):
        _, pp, dp = grid
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            parts: dict[str, Any] = {"virtual_stages": 2} if schedule == INTERLEAVED else {}
            if parts and pp == 4:  # 8 parts, more than the presets have layers
                parts["layers_per_stage"] = (0, 1, 1, 1, 1, 1, 1, 0)
            for sharded in (True, False) if dp > 1 else (True,):
                yield grid, {"schedule": schedule, "sharded_optimizer": sharded, **parts}


def _case(grid: Grid, sequences: int, bucket_size: int | None = None, **options: Any) -> Case:
    tp, pp, dp = grid
    share = sequences // dp
    micro = share // min(MICROBATCHES[sequences][pp], share)
    return Case(ParallelConfig(tp=tp, pp=pp, **options), dp, micro, bucket_size)


def _resumes(sequences: int) -> list[Case]:
    """The second half of the steps in another layout than the first."""
    pairs = [
        (_case((4, 1, 2), sequences), _case((2, 2, 2), sequences, schedule="zero_bubble")),
        (_case((1, 1, 4), sequences, SMALL_BUCKET), _case((2, 4, 1), sequences)),
        (_case((2, 2, 1), sequences), _case((1, 1, 4), sequences)),
        (_case((1, 4, 1), sequences), _case((4, 1, 1), sequences)),
    ]
    return [replace(last, after=first) for last, first in pairs]


def _ranks(case: Case | None) -> int:
    return case.ranks if case else 1


def _measure_all(planned: list[tuple[Problem, list[Case]]]) -> list[Row]:
    rows: list[Row] = []
    total, started = sum(len(cases) for _, cases in planned), time.perf_counter()
    for problem, cases in planned:
        reference = _measure(problem, [Case()])[0]
        for first in range(0, len(cases), AT_A_TIME):
            some = cases[first : first + AT_A_TIME]
            new = [
                Row(problem, case, deviation(outcome, reference), outcome.torn)
                for case, outcome in zip(some, _measure(problem, some), strict=True)
            ]
            rows += new
            passed = time.perf_counter() - started
            left = passed / len(rows) * (total - len(rows))
            loss, norm, parameters = _largest(new)
            deviations = f"loss {loss}, gradient norm {norm}, parameters {parameters}"
            print(f"{len(rows):>3}/{total} | {problem.preset} | {deviations} | ETA {duration(left)}", flush=True)
            for text in (text for row in new for text in row.problems):
                print(f"  OUT OF TOLERANCE: {text}", flush=True)
    return rows


def _measure(problem: Problem, cases: Sequence[Case]) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as directory:
        return measure(Path(directory), problem, cases, timeout_s=1800)


def rounding(presets: Sequence[str]) -> list[Rounded]:
    """What rounding alone does: one process against itself with other microbatches, as measured and with the settings
    that training usually has."""
    found = []
    for preset, settings in itertools.product(presets, HARSH):
        whole = PROBLEMS[preset]["batch.global"]
        one, other = _measure(Problem(preset, PROBLEMS[preset] | settings), [Case(), Case(micro=whole)])
        found.append((preset, settings, deviation(other, one)))
    return found


def report(rows: Sequence[Row], rounded: Sequence[Rounded], options: argparse.Namespace, seconds: float) -> str:
    """The page docs/parity.md."""
    by_preset = {preset: [row for row in rows if row.problem.preset == preset] for preset in options.presets}
    summary = [f"| {preset} | {len(of)} | " + " | ".join(_largest(of)) + " |" for preset, of in by_preset.items()]
    alone = [f"| {preset} | {_settings(changed)} | {_cells(found)} |" for preset, changed, found in rounded]
    sections = [
        "\n".join([f"\n## {preset}\n", HEADER, *(f"| {_describe(row.case)} | {_cells(row.deviation)} |" for row in of)])
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


def _largest(rows: Sequence[Row]) -> list[str]:
    """The largest deviations of several rows: loss, gradient norm, parameters."""
    found = [(row.deviation.loss, row.deviation.grad_norm, row.deviation.parameters) for row in rows]
    return [f"{max(values):.1e}" for values in zip(*found, strict=True)]


def _cells(found: Deviation) -> str:
    worst = found.worst.removeprefix("model.")
    return f"{found.loss:.1e} | {found.grad_norm:.1e} | {found.parameters:.1e} | {worst}"


def _describe(case: Case) -> str:
    """Layout, schedule and options, as cells."""
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


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


HEADER = """\
| layout | schedule | options | loss | gradient norm | parameters | worst tensor |
|---|---|---|---|---|---|---|"""

PAGE = """\
# Parity

`{command}` ({place}). This page is the program's output; `tests/parallel/test_parity.py` holds a smaller table in CI.

Each row is a training run of {steps} steps on gloo ranks in fp32, from `train` to the checkpoint, beside the run of a
single process: the largest relative deviation of a loss (of each step and of three evaluations) and of a gradient norm,
and the relative L2 of the logical tensor that deviates most. Tolerances: {tolerances}. Also, all ranks that hold the
same part of a tensor held the same bits at every step, and so did the tied embeddings at both ends of a pipeline. The
vocabulary has 257 entries, which no layout divides; 4 tensor-parallel ranks share 2 key and value heads in pairs.

Every grid of tp, pp and dp in 1, 2, 4 with at most {ranks} ranks ({admitted} of {grids}; the others were not run) meets
every schedule, with a sharded optimizer and without; kinds of recomputation take turns, so that each of these meets
every kind in one of the four families. "a then b": half of the steps in layout a, and the others in layout b, from a's
checkpoint.

| preset | runs | loss | gradient norm | parameters |
|---|---|---|---|---|
{summary}

## Rounding alone

One process beside itself, all sequences of a step in one microbatch instead of one in each: no layout can be expected
to come closer. It also says why the runs start from larger weights (`model.init_std` 0.1) and divide by more
(`optimizer.eps` 1e-4) than training usually does. With 0.02 the embedding of a rare token comes close to zero after a
few steps, and its norm layer multiplies rounding errors. With 1e-8 Adam blows up the rounding errors of those elements
of a key bias whose rotary frequency is so low that softmax hardly sees them.

| preset | changed | loss | gradient norm | parameters | worst tensor |
|---|---|---|---|---|---|
{rounding}
{sections}
"""

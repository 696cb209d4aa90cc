"""Parity campaign: compare many layouts of every family with a single process, and tabulate the deviations.

Each row is a complete training run on real ranks (gloo, fp32), compared with the run of a single process; see
engine/testing/parity.py. The program fails if a tolerance is exceeded.
"""

import argparse
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.cli.arguments import program_parser, require_at_least
from engine.errors import ConfigError, TriaxisError
from engine.formatting import duration
from engine.testing.parity import Case, Outcome, Problem, deviation, measure
from engine.testing.parity_cases import PROBLEMS, plan_cases
from engine.testing.parity_report import Rounded, Row, largest, report

EXAMPLES = """
examples:
  %(prog)s --output docs/parity.md
  %(prog)s --ranks 4 --presets tiny-qwen2
"""
HARSH: list[dict[str, Any]] = [{}, {"model.init_std": 0.02}, {"optimizer.eps": 1e-8}]
AT_A_TIME = 8  # cases per set of processes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = parser().parse_args(arguments)
    require_at_least(2, ranks=options.ranks)
    if options.output and not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: no such directory: {options.output.parent}")
    started = time.perf_counter()
    rows = _measure_all(plan_cases(options.presets, options.ranks))
    if failed := [text for row in rows for text in row.problems]:
        raise TriaxisError("\n  ".join([f"{len(failed)} deviations out of tolerance; nothing was written:", *failed]))
    print(f"{len(rows)} runs agree with one process")
    if options.output:
        text = report(rows, rounding(options.presets), options, time.perf_counter() - started)
        options.output.write_text(text, encoding="utf-8")
        print(f"written: {options.output}")


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("parity", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="maximum ranks of a layout (default 8)")
    add("--presets", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="PRESET", help=", ".join(PROBLEMS))
    add("--output", type=Path, metavar="FILE", help="write the table here, as Markdown")
    add("--machine", default=_machine(), help="description of the machine (default: %(default)s)")
    return parser


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
            loss, norm, parameters = largest(new)
            deviations = f"loss {loss}, gradient norm {norm}, parameters {parameters}"
            print(f"{len(rows):>3}/{total} | {problem.preset} | {deviations} | ETA {duration(left)}", flush=True)
            for text in (text for row in new for text in row.problems):
                print(f"  OUT OF TOLERANCE: {text}", flush=True)
    return rows


def _measure(problem: Problem, cases: Sequence[Case]) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as directory:
        return measure(Path(directory), problem, cases, timeout_s=1800)


def rounding(presets: Sequence[str]) -> list[Rounded]:
    """Measure the effect of rounding: compare one process with itself with other microbatches, with the settings of
    the campaign and with usual training settings.
    """
    found = []
    for preset, settings in itertools.product(presets, HARSH):
        whole = PROBLEMS[preset]["batch.global"]
        one, other = _measure(Problem(preset, PROBLEMS[preset] | settings), [Case(), Case(micro=whole)])
        found.append((preset, settings, deviation(other, one)))
    return found


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"

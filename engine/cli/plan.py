"""Check a pipeline schedule and show its timeline, posted receives, bubble and activations, without starting a run."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from itertools import product
from pathlib import Path

from engine.cli.arguments import program_parser, require_at_least
from engine.cli.progress import ProgressDisplay
from engine.errors import ConfigError
from engine.formatting import counted
from engine.parallel.pipeline.check import check_schedule
from engine.parallel.pipeline.program import Program, posted_receives
from engine.parallel.pipeline.schedules import FORWARD_ONLY, INTERLEAVED, SCHEDULES, Schedule, build_schedule
from engine.parallel.pipeline.simulate import Costs, Timeline, bubble_fraction, peak_activations, simulate
from engine.plan import timeline

EXAMPLES = """
examples:
  %(prog)s --schedule 1f1b --stages 4 --microbatches 8
  %(prog)s --schedule all --stages 4 --microbatches 8 --output schedules.png
  %(prog)s --schedule all --stages 16 --microbatches 64 --chunks 4 --up-to
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = parser().parse_args(arguments)
    if options.up_to:
        return _prove_up_to(options)
    costs = _costs(options)
    timelines: dict[str, Timeline] = {}
    receives: dict[str, timeline.Receives] = {}
    for name in SCHEDULES if options.schedule == "all" else (options.schedule,):
        schedule = build_schedule(name, options.stages, options.microbatches, _num_chunks(name, options))
        program, title = check_schedule(schedule), _title(schedule)
        timelines[title] = simulate(schedule, costs, program.posted_after)
        receives[title] = posted_receives(program, timelines[title])
        _print(program, costs, timelines[title], receives[title])
    if options.output:
        timeline.draw(timelines, options.output, receives)
        print(f"written: {options.output}")


def _prove_up_to(options: argparse.Namespace) -> None:
    """Prove every schedule of at most these sizes."""
    if options.output:
        raise ConfigError(f"--output {options.output}: --up-to draws no schedule; leave out one of the two")
    require_at_least(1, stages=options.stages, microbatches=options.microbatches, chunks=options.chunks)
    names = (*SCHEDULES, FORWARD_ONLY) if options.schedule == "all" else (options.schedule,)
    chunks = {INTERLEAVED: range(2, (options.chunks or 2) + 1), FORWARD_ONLY: range(1, (options.chunks or 1) + 1)}
    stages, microbatches = range(1, options.stages + 1), range(1, options.microbatches + 1)
    sizes = [s for name in names for s in product((name,), stages, microbatches, chunks.get(name, (1,)))]
    with closing(ProgressDisplay(len(sizes))) as progress:
        for number, size in enumerate(sizes, 1):
            check_schedule(build_schedule(*size))
            progress.update(number, f"{number:,} of {len(sizes):,} schedules proven")
    print(f"{counted(len(sizes), 'schedule')} verified: no message can hang")


def _costs(options: argparse.Namespace) -> Costs:
    if min(options.costs) <= 0 or options.send < 0:
        raise ConfigError(f"--costs = {options.costs}, --send = {options.send}; expected costs > 0 and a send >= 0")
    forward, backward_input, backward_weight = options.costs
    return Costs(forward, backward_input, backward_weight, options.send)


def _num_chunks(name: str, options: argparse.Namespace) -> int:
    """Return --chunks or its default; with --schedule all, it applies only to the interleaved schedule."""
    default = 2 if name == INTERLEAVED else 1
    if options.chunks is None or (options.schedule == "all" and name != INTERLEAVED):
        return default
    return int(options.chunks)


def _title(schedule: Schedule) -> str:
    chunks = f", {schedule.num_chunks} chunks per stage" if schedule.num_chunks > 1 else ""
    return f"{schedule.name}{chunks}"


def _print(program: Program, costs: Costs, times: Timeline, receives: timeline.Receives) -> None:
    schedule = program.schedule
    peaks = [f"{peak / schedule.num_chunks:g}" for peak in peak_activations(schedule)]
    print(f"{_title(schedule)}: verified for {schedule.num_stages} stages and {schedule.num_microbatches} microbatches")
    print(timeline.text(times, receives))
    print(f"bubble  {bubble_fraction(times):.1%} of the ideal time")
    print(f"most activations in flight, in microbatches per stage  {' '.join(peaks)}")
    print(f"receives posted at least one action ahead  {program.receives_ahead:.0%}; no message can hang")
    if costs.send:
        slower = _makespan(times) / _makespan(simulate(schedule, costs)) - 1
        print(f"time against all receives posted from the start  {slower:+.2%}")
    print()


def _makespan(times: Timeline) -> float:
    return max(spans[-1].end for spans in times)


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("plan", __doc__, EXAMPLES)
    add = parser.add_argument
    names = (*SCHEDULES, FORWARD_ONLY, "all")
    add("--schedule", choices=names, required=True, help=f"parallel.schedule, {FORWARD_ONLY} (evaluation), or all")
    add("--stages", type=int, required=True, metavar="P", help="parallel.pp")
    add("--microbatches", type=int, required=True, metavar="M", help="per step and data-parallel rank")
    add("--chunks", type=int, metavar="V", help=f"parallel.virtual_stages (default 2 for {INTERLEAVED}, else 1)")
    add("--costs", type=float, nargs=3, default=[1.0, 1.0, 1.0], metavar=("F", "I", "W"),
        help="time of a stage's forward, and of its input and weight backward (default 1 1 1)")  # fmt: skip
    add("--send", type=float, default=0.0, metavar="S", help="transfer time between stages (default 0)")
    add("--up-to", action="store_true", help="prove all schedules of at most these sizes, and draw none")
    add("--output", type=Path, metavar="FILE", help="write the timelines to this image (.png, .svg, .pdf)")
    return parser

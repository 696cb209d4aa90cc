"""Prove that the ranks of a layout cannot hang, without a GPU: record what they communicate, and run it in a simulator.

The training step, an evaluation and the reading of a checkpoint run as every distinct rank, in the real code but on
PyTorch's meta device, which has shapes and no values. The programs are held against each other and run with a stream
for each communicator, with one hardware queue, and with every operation blocking, which covers hosts that stop for
their devices anywhere. Printed are the verdict and what a step communicates. Exit code 1: something hangs or does not
match.
"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch

from engine.checkpoint.opening import trained
from engine.cli.arguments import program_parser, require_at_least
from engine.cli.progress import ProgressDisplay
from engine.config.derived import microbatches
from engine.config.load import load, resolve
from engine.config.schema import Config, OpsConfig
from engine.errors import ConfigError, TriaxisError
from engine.formatting import counted, duration
from engine.model.families import PRESETS
from engine.parallel.layout import Layout
from engine.plan.layouts import choose_layout
from engine.plan.memory import ClusterSpec
from engine.testing.communication import CHECKS, Record
from engine.testing.proof import distinct_ranks, failures, record_in_processes
from engine.testing.simulator import MODES
from engine.testing.traffic import busiest, communicators, phases, traffic

EXAMPLES = """
Any setting can be added: --section.key VALUE; `triaxis config --schema` lists them all.

examples:
  %(prog)s --layout tp=8,pp=4,dp=32 --preset llama2-7b
  %(prog)s --layout tp=2,pp=4,dp=2 --preset tiny --parallel.schedule zero_bubble --all-ranks
  %(prog)s --layout tp=4,pp=2,dp=8 --config examples/configs/llama2_7b.yaml --precision.mode fp8
"""
_STEPS = 2  # the second waits for what the first has left under way
_MOST_SHOWN = 20  # problems


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options, overrides = parser().parse_known_args(arguments)
    require_at_least(1, microbatches=options.microbatches, processes=options.processes)
    started = time.perf_counter()
    layout = _layout(options.layout)
    config = _config(options, overrides, layout)
    ranks = list(range(layout.world_size)) if options.all_ranks else distinct_ranks(config, layout)
    records = _record(config, layout, ranks, min(options.processes, -(-len(ranks) // 2)))
    found = failures(records, symmetric=not options.all_ranks)
    title = f"tp {layout.tp} × pp {layout.pp} × dp {layout.dp}"
    if found:
        more = [f"… and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
        raise TriaxisError("\n  ".join([f"{counted(len(found), 'problem')} in {title}:", *found[:_MOST_SHOWN], *more]))
    print(f"{title}: no problem in {', '.join(CHECKS)}; no hang with {', '.join(MODES)}")
    _print_recorded(config, layout, len(ranks), sum(len(record.events) for record in records))
    _print_traffic(records)
    print(f"took           {duration(time.perf_counter() - started)}")


def _layout(text: str) -> Layout:
    """Parse `tp=8,pp=4,dp=32`; an axis that is not named has one rank."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in ("tp", "pp", "dp") or not size.isdecimal() or axis in sizes:
            raise ConfigError(f"--layout {text}: {part!r} is not an axis and its size, as in tp=8,pp=4,dp=32")
        sizes[axis] = int(size)
    return Layout(**sizes)


def _config(options: argparse.Namespace, overrides: list[str], layout: Layout) -> Config:
    """The configuration to prove, on the layout, with PyTorch's operators: they do not communicate.

    Raises:
        ConfigError: it is not valid, or does not work with the layout.
    """
    default = None if options.config else max(2 * layout.pp, 2)
    count = options.microbatches or default
    _require_free(overrides, counted=count is not None)
    overrides = [*overrides, f"--parallel.tp={layout.tp}", f"--parallel.pp={layout.pp}", "--parallel.compile=false"]
    if options.config:
        config = load(options.config, overrides, presets=PRESETS, trained=trained)
    else:
        config = resolve(_preset(options.preset), overrides, presets=PRESETS, source="the options", trained=trained)
    if count is not None:
        batch = config.batch.model_copy(update={"global_": count * config.batch.micro * layout.dp})
        config = config.model_copy(update={"batch": batch})
    config = config.model_copy(update={"ops": OpsConfig()})
    enough = 1 << 60  # bytes: the layout is given, whatever it needs
    choose_layout(config, ClusterSpec(layout.world_size, layout.tp, enough, "cuda", torch.bfloat16))
    return config


def _require_free(overrides: list[str], *, counted: bool) -> None:
    """Refuse settings that options of this program decide, rather than prove something else than what is asked for."""
    decided = {"parallel.tp": "--layout", "parallel.pp": "--layout"} | (
        {"batch.global": "--microbatches"} if counted else {}
    )
    for name in (argument.partition("=")[0].removeprefix("--") for argument in overrides):
        if name in decided:
            raise ConfigError(f"--{name}: {decided[name]} decides it here; leave it out, or change {decided[name]}")


def _preset(name: str) -> dict[str, Any]:
    """The settings of a run that has no configuration: what it reads and where it writes is never opened."""
    length = PRESETS[name]["max_position"]
    return {
        "model": {"preset": name},
        "data": {"tokenizer": "byte", "train": [{"path": "none"}], "seq_length": length},
        "batch": {"micro": 1, "global": 1},
        "train": {"steps": _STEPS},
    }


def _record(config: Config, layout: Layout, ranks: list[int], processes: int) -> list[Record]:
    records: list[Record] = []
    with closing(ProgressDisplay(len(ranks))) as progress:
        for share in record_in_processes(config, layout, ranks, steps=_STEPS, processes=processes):
            records += share
            progress.update(len(records), f"{len(records):,} of {counted(len(ranks), 'rank')} recorded")
    return records


def _print_recorded(config: Config, layout: Layout, recorded: int, num_events: int) -> None:
    count = microbatches(config.batch, layout.dp)
    same = "" if recorded == layout.world_size else "; the others run programs that are among these"
    print(f"recorded       {recorded:,} of {counted(layout.world_size, 'rank')}, {num_events:,} events{same}")
    print(f"schedule       {config.parallel.schedule}, {counted(count, 'microbatch', 'es')} of {config.batch.micro}")


def _print_traffic(records: Sequence[Record]) -> None:
    """A table of the last step: for each axis and kind the launches and bytes of the rank that has most."""
    if len(records) < 2:
        return
    of_step = [traffic(phases(record)[f"step {_STEPS}"]) for record in records]
    most = busiest(of_step)
    print("sent per step, by the rank that sends most of it (ring algorithms)")
    for (axis, kind), launches in sorted(most.launches.items()):
        if kind != "recv":  # as many as the sends
            print(_row(f"{axis:<16}{kind}", launches, most.sent[axis, kind]))
    launched, sent = (max(part.launches.total() for part in of_step), max(part.sent.total() for part in of_step))
    print(_row("everything, receives too", launched, sent))
    print(f"in flight      at most {_size(most.peak_bytes)} at once")
    counts = max((communicators(record) for record in records), key=lambda count: count.total())
    by_axis = ", ".join(f"{axis} {number}" for axis, number in sorted(counts.items()))
    print(f"communicators  at most {counts.total()} on a rank: {by_axis}")


def _row(title: str, launches: int, num_bytes: int) -> str:
    return f"  {title:<32}{launches:>8,} launches {_size(num_bytes):>18}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.3f} MB"


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("prove", __doc__, EXAMPLES)
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--layout", required=True, metavar="AXES", help="ranks of each axis, such as tp=8,pp=4,dp=32")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"a model: {', '.join(PRESETS)}")
    source.add_argument("--config", metavar="FILE", help="the YAML file of a run")
    add("--microbatches", type=int, metavar="M",
        help="per step and data-parallel rank (default: those of the file; twice the stages for a preset)")  # fmt: skip
    add("--all-ranks", action="store_true", help="record every rank, not only distinct ones and a peer of each")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="that record (default: %(default)s)")
    return parser

"""Compare training steps of several layouts: tokens/s relative to one rank, memory, and pipeline timelines.

Every rank is a single-threaded process, connected by gloo; all layouts train on the same tokens. A round runs every
layout once, so that other load on the machine affects all of them equally; compare the ratios of the medians.

    python tools/bench/parallel.py --rounds 3
    python tools/bench/parallel.py --layouts one pp2 pp2-zero-bubble --timeline pipeline.png
    python tools/bench/parallel.py --others olmo_core --python ../other-venv/bin/python

`--others` measures the same model and layouts in OLMo-core or Megatron-core, installed in the environment of --python,
in the same rounds; see tools/bench/others/.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config.load import resolve
from engine.config.schema import Config
from engine.errors import ConfigError, run_program
from engine.model.families import PRESETS
from engine.parallel.layout import Layout
from engine.parallel.pipeline.schedules import ActionKind, build_schedule
from engine.parallel.pipeline.simulate import Costs, TimedAction, Timeline, simulate
from engine.plan import timeline
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import random_batches
from engine.train.step import build_model, train_step

LAYOUTS: dict[str, tuple[Layout, list[str]]] = {
    "one": (Layout(), []),
    "dp2": (Layout(dp=2), []),
    "dp2-plain": (Layout(dp=2), ["--parallel.sharded_optimizer", "false"]),
    "tp2": (Layout(tp=2), []),
    "pp2": (Layout(pp=2), []),
    "pp2-gpipe": (Layout(pp=2), ["--parallel.schedule", "gpipe"]),
    "pp2-zero-bubble": (Layout(pp=2), ["--parallel.schedule", "zero_bubble"]),
    "pp2-interleaved": (Layout(pp=2), ["--parallel.schedule", "interleaved", "--parallel.virtual_stages", "2"]),
    "tp2-pp2": (Layout(tp=2, pp=2), []),
}
_OTHER_LAYOUTS = ("one", "dp2", "tp2", "pp2")
_DEFAULT = ["one", "dp2", "tp2", "pp2", "pp2-zero-bubble", "pp2-interleaved"]


@dataclass(frozen=True)
class Measured:
    """Measurements of one rank: seconds of each step, its peak memory in bytes, and the actions of the last step."""

    seconds: list[float]
    peak_bytes: int
    spans: tuple[TimedAction, ...]
    loss: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = _parser().parse_args(arguments)
    configs = {name: _config(options, LAYOUTS[name][1]) for name in options.layouts}
    model = next(iter(configs.values())).model
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; {model.num_layers} layers, "
        f"hidden {model.hidden_size}, vocabulary {model.vocab_size}, sequence {options.seq_length}, "
        f"{options.global_batch} sequences a step, fp32, one thread a rank"
    )
    results: dict[str, list[list[Measured]]] = {name: [] for name in options.layouts}
    alternatives: dict[tuple[str, str], list[float]] = {}  # seconds of steps, by layout and project
    for number in range(options.rounds):
        for name, config in configs.items():
            started = time.perf_counter()
            layout = LAYOUTS[name][0]
            results[name].append(run_ranks(layout.world_size, measure, config, layout, options.steps, timeout_s=3600))
            print(f"round {number + 1}/{options.rounds}  {name:16} {time.perf_counter() - started:.0f} s", flush=True)
            for other in options.others if name in _OTHER_LAYOUTS else ():
                alternatives.setdefault((name, other), []).extend(_other(other, name, options))
    _print(results, alternatives, options.global_batch * options.seq_length)
    if options.timeline:
        _draw(configs, results, options.timeline)


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n    ")
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0],
        epilog=f"examples:\n    {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=_DEFAULT, metavar="LAYOUT", help=", ".join(LAYOUTS)
    )
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--global-batch", type=int, default=8, help="sequences per step, one per microbatch")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round, after an untimed one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--others", nargs="+", choices=("olmo_core", "megatron_core"), default=[], metavar="PROJECT")
    parser.add_argument("--python", default="python", help="interpreter of the environment of the other projects")
    parser.add_argument("--timeline", type=Path, help="write measured and predicted timelines to this image")
    return parser


def _config(options: argparse.Namespace, overrides: list[str]) -> Config:
    hidden = options.hidden_size
    sizes = (hidden, options.layers, options.vocab_size, options.seq_length, options.global_batch)
    if options.others and sizes != (1024, 6, 8192, 512, 8):
        raise ConfigError("--others measures the default sizes; leave out the options that change them")
    if hidden % 64:
        raise ConfigError(f"--hidden-size {hidden}: expected a multiple of the head size, 64")
    raw: dict[str, Any] = {
        "model": {
            "preset": "tiny",
            "num_layers": options.layers,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_heads": hidden // 64,
            "num_kv_heads": hidden // 64,
            "head_dim": 64,
            "vocab_size": options.vocab_size,
        },
        "data": {"tokenizer": "byte", "train": [{"path": "unused"}], "seq_length": options.seq_length},
        "batch": {"micro": 1, "global": options.global_batch},
        "train": {"steps": 1},
    }
    return resolve(raw, overrides, presets=PRESETS, source="the benchmark")


def measure(config: Config, layout: Layout, steps: int) -> Measured:
    """Run one warmup step and `steps` timed ones, on every rank."""
    world = world_of(layout)
    before = _peak_bytes()
    model, optimizer = build_model(config, world, torch.float32, seed=0)
    batches = random_batches(config, dp_rank=world.coords.dp, dp_size=layout.dp)
    tokens = config.batch.global_ * config.data.seq_length
    seconds: list[float] = []
    for step in range(1, steps + 2):
        spans: list[TimedAction] = []
        model.pipeline.observe = lambda action, start, end, spans=spans: spans.append(TimedAction(action, start, end))
        if world.control_group is not None:
            dist.barrier(world.control_group)
        started = time.perf_counter()
        result = train_step(model, optimizer, batches, step=step, lr=1e-4, tokens=tokens)
        result.grad_norm.item()
        seconds.append(time.perf_counter() - started)
    loss = result.loss.clone()
    world.sum_on_device(loss)
    return Measured(seconds[1:], _peak_bytes() - before, tuple(spans), loss.item())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _other(project: str, layout: str, options: argparse.Namespace) -> list[float]:
    """Measure the seconds of each step in another project."""
    script = Path(__file__).parent / "others" / f"step_{project}.py"
    ranks = str(LAYOUTS[layout][0].world_size)
    launch = [options.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, str(script)]
    done = subprocess.run(
        [*launch, "--layout", layout, "--steps", str(options.steps), "--warmup", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if line is None:
        print(f"    {project} {layout} gave no result: {done.stderr.strip().splitlines()[-1:]}")
        return []
    return list(json.loads(line)["step_s"])


def _print(
    results: dict[str, list[list[Measured]]], alternatives: dict[tuple[str, str], list[float]], tokens: int
) -> None:
    medians = {name: _median(rounds) for name, rounds in results.items()}
    first = next(iter(medians))
    print(f"\n{'layout':16} {'tokens/s':>9} {'vs ' + first:>12} {'peak GiB per rank':>18} {'loss':>9}")
    for name, rounds in results.items():
        peak = max(rank.peak_bytes for ranks in rounds for rank in ranks) / 2**30
        ratio = medians[first] / medians[name]
        print(f"{name:16} {tokens / medians[name]:9,.0f} {ratio:11.2f}× {peak:18.2f} {rounds[-1][0].loss:9.5f}")
    for (name, other), seconds in alternatives.items():
        if seconds:
            median = statistics.median(seconds)
            print(f"{name + ' ' + other:32} {tokens / median:9,.0f} tokens/s; ours is {median / medians[name]:.2f}×")


def _median(rounds: list[list[Measured]]) -> float:
    """Return the median seconds of a step, which ends with its slowest rank."""
    return statistics.median(
        max(seconds) for ranks in rounds for seconds in zip(*(r.seconds for r in ranks), strict=True)
    )


def _draw(configs: dict[str, Config], results: dict[str, list[list[Measured]]], path: Path) -> None:
    """Draw measured and predicted timelines of the pipelines without tensor and data parallelism."""
    panels: dict[str, Timeline] = {}
    for name, rounds in results.items():
        layout, config = LAYOUTS[name][0], configs[name]
        if layout.pp == 1 or layout.world_size != layout.pp:
            continue
        spans = tuple(rank.spans for rank in rounds[-1])
        schedule = build_schedule(
            config.parallel.schedule, layout.pp, config.batch.global_, config.parallel.virtual_stages
        )
        panels[f"{name}, measured"] = spans
        panels[f"{name}, predicted"] = simulate(schedule, _costs(spans, schedule.num_chunks))
    if not panels:
        raise ConfigError("--timeline needs a layout that is a pipeline, like pp2")
    timeline.draw(panels, path)
    print(f"written: {path}")


def _costs(spans: Timeline, num_chunks: int) -> Costs:
    """Return the median duration of each kind of action, for a microbatch through all chunks of a stage."""

    def median(kind: ActionKind) -> float:
        times = [span.end - span.start for stage in spans for span in stage if span.action.kind is kind]
        return statistics.median(times) * num_chunks if times else 0.0

    whole = median(ActionKind.BACKWARD)
    return Costs(
        median(ActionKind.FORWARD),
        whole / 2 or median(ActionKind.BACKWARD_INPUT),
        whole / 2 or median(ActionKind.BACKWARD_WEIGHT),
    )


if __name__ == "__main__":
    run_program(main)

r"""First runs of several ranks on one GPU: which layouts train, how fast, and how soon a failing rank ends the others.

Every run is started by torchrun and trains a small model (4 layers, 8 microbatches, fp32; hidden 512, or 64 on a CPU)
for 4 steps. A rank that is not done after --timeout seconds prints its stacks and its last calls to other ranks, and
ends. The ranks share the GPU, which NCCL allows from 2.30 on; a newer one than PyTorch's is loaded in front of it:

    pip install --target nccl 'nvidia-nccl-cu13>=2.30'
    LD_PRELOAD=$PWD/nccl/nvidia/nccl/lib/libnccl.so.2 python tools/bench/ranks.py
    LD_PRELOAD=… python tools/bench/ranks.py --traces traces         # and how much of the communication is hidden
    python tools/bench/ranks.py --backend staged                    # any NCCL: every message goes through the host
    python tools/bench/ranks.py --device cpu --backend gloo --only 'pp 2' 'pp 2, rank 1 fails in step 2'

The table has the losses: those of every layout must be those of one rank. Exit code 1: a run did not do what it should.
With --traces, the tables of overlap.py follow, from a trace of the last two steps of each rank; with DIR, traces stay.
Ranks that share a GPU take turns on it, so their figures say what runs beside what, not how fast it is alone. Settings
of a run (`--section.key VALUE`) can follow, as for a layer of the size of llama2-7b's:

    LD_PRELOAD=… python tools/bench/ranks.py --only 'one rank' 'dp 2' 'tp 2' 'pp 2' --traces traces --timeout 60 \
        --precision.mode bf16 --model.hidden_size 4096 --model.intermediate_size 11008 --model.num_heads 32 \
        --model.num_kv_heads 32 --model.head_dim 128 --data.seq_length 2048
"""

import argparse
import faulthandler
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import profile, schedule

import engine.train.step
import engine.train.trainer
import engine.train.warm_up
from engine.config.schema import Config
from engine.errors import ConfigError, run_program
from engine.parallel.layout import choose_device
from engine.testing.distributed import SHARED_GPU
from engine.testing.hangs import RECORDER_SETTINGS, recorded_calls
from engine.testing.runs import losses, read_records, run_config, write_dataset
from engine.testing.staged import STAGED, register_staged
from engine.train.run import train

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.kernel_table import source
from tools.bench.overlap import ALL, Activity, overlaps, read_activity, table, usage
from tools.bench.results import Results

_HIDDEN_SIZE = {"cuda": 512, "cpu": 64}
_STEPS, _FAILS_IN = 4, 2
_TOLERANCE, _ROUNDED = 1e-5, 1e-2  # of a loss, relative: other orders of summation, in fp32 and in fewer bits
_REPORT = 40  # last lines of each rank of a run that went wrong


@dataclass(frozen=True)
class Run:
    """A layout to train.

    Attributes:
        rank_1_fails: rank 1 raises an error in the second step.
        warms_up: without, the stages use their kernels for the first time beside posted receives, and may hang.
    """

    ranks: int = 1
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    rank_1_fails: bool = False
    warms_up: bool = True


PP = ("--parallel.pp", "2")
RUNS = {
    "one rank": Run(),
    "dp 2": Run(2),
    "tp 2": Run(2, ("--parallel.tp", "2")),
    "pp 2": Run(2, PP),
    "pp 2, not warmed up": Run(2, PP, warms_up=False),
    "pp 2, one hardware queue": Run(2, PP, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    "pp 2, interleaved": Run(2, (*PP, "--parallel.schedule", "interleaved", "--parallel.virtual_stages", "2")),
    "pp 2, zero bubble": Run(2, (*PP, "--parallel.schedule", "zero_bubble")),
    "pp 2, rank 1 fails in step 2": Run(2, PP, rank_1_fails=True),
}


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        exit_code: of torchrun.
        seconds: from the start of torchrun to its end.
        step_seconds: of each step, as logged.
        ended_after: seconds from the error of rank 1 to the end of torchrun.
        output: of the ranks, the last lines of each.
    """

    exit_code: int
    seconds: float
    step_seconds: list[float]
    losses: list[float]
    ended_after: float | None
    output: str

    def is_as_expected(self, run: Run, reference: "Result | None", tolerance: float = _TOLERANCE) -> bool:
        """Whether all steps have the losses of `reference`, or the error of rank 1 has ended the run.

        A run that may hang is as expected in any case.
        """
        if not run.warms_up:
            return True
        if run.rank_1_fails:
            return self.exit_code != 0 and self.ended_after is not None and "planted" in self.output
        expected = reference.losses if reference else self.losses
        pairs = zip(self.losses, expected, strict=False)
        close = all(abs(loss - other) <= tolerance * abs(other) for loss, other in pairs)
        return self.exit_code == 0 and len(self.losses) == _STEPS and close


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see the module's docstring."""
    options = _parse(arguments)
    if "LOCAL_RANK" in os.environ:
        return _train_on_rank(options)
    with tempfile.TemporaryDirectory() as name:
        options.directory = Path(name)
        _config(options, Run())  # refuses unknown settings
        if options.traces is True:
            options.traces = options.directory / "traces"
        results, bad = _start_all(options, options.directory)
    for name in bad:
        print(f"== {name}, exit code {results[name].exit_code}\n{results[name].output}", file=sys.stderr)
    sys.exit(1 if bad else 0)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--backend", choices=("nccl", STAGED, "gloo"), default="nccl", help="(default: nccl)")
    parser.add_argument(
        "--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    parser.add_argument("--timeout", type=float, default=30, metavar="S", help="seconds per run (default: 30)")
    parser.add_argument("--traces", type=Path, nargs="?", const=True, metavar="DIR",
        help="also say how much communication is hidden, from traces, left in DIR; see overlap.py")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # of the ranks
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    return options


def _start_all(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Result], list[str]]:
    """Start the runs one behind the other; return their results, and which are not as expected."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if options.backend == "nccl" else "not used"
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"{device}, torch {torch.__version__}, backend {options.backend}, NCCL {nccl}\n")
    print("| run | exit code | seconds | first step, s | other steps, s | losses |\n|---|---|---|---|---|---|")
    results: dict[str, Result] = {}
    tolerance = _ROUNDED if "--precision.mode" in options.overrides else _TOLERANCE
    bad, written = [], Results(options.json, source(options.commit) | {"nccl": nccl, "backend": options.backend})
    for number, name in enumerate(options.only):
        results[name] = _start(options, name, RUNS[name], directory / f"run{number}")
        row = asdict(results[name])
        if not results[name].is_as_expected(RUNS[name], results.get("one rank"), tolerance):
            bad.append(name)
            row["error"] = f"exit code {results[name].exit_code}, or losses of other than one rank's"
        written.add(f"ranks {name}", row)
        print(_row(name, results[name]), flush=True)
    if options.traces is not None:
        _report_overlap(options.traces, options.only, written, bad)
    return results, bad


def _report_overlap(directory: Path, names: Sequence[str], written: Results, bad: list[str]) -> None:
    """Print and write the share of communication that is hidden, of each run that has left traces in `directory`; add
    to `bad` those over NCCL whose traces have no communication.
    """
    for name in names:
        paths = sorted((directory / name).glob("rank*.json.gz"))
        if not paths:
            continue
        print(f"\n{name}\n")
        try:
            found = [read_activity(path) for path in paths]
        except ConfigError as error:
            print(error)
            if written.machine["backend"] == "nccl":
                written.add(f"ranks {name}, hidden communication", {"error": str(error)})
                bad.append(name)
            continue
        print(*table(found), sep="\n", flush=True)
        written.add(f"ranks {name}, hidden communication", _overlap_row(found))


def _overlap_row(found: Sequence[Activity]) -> dict[str, Any]:
    """The hidden share of the communication of all ranks, and its parts."""
    rows = [row for activity in found for row in overlaps(activity)]
    together = [row for row in rows if row.axis == ALL]
    return {
        "value": 100 * sum(row.hidden_ms for row in together) / sum(row.total_ms for row in together),
        "unit": "%",
        "overlap": [asdict(row) for row in rows],
        "usage": [asdict(usage(activity)) for activity in found],
    }


def _row(name: str, result: Result) -> str:
    first, others = result.step_seconds[:1], result.step_seconds[1:]
    steps = [f"{statistics.median(some):.2f}" if some else "" for some in (first, others)]
    ended = "" if result.ended_after is None else f" ({result.ended_after:.1f} after the error)"
    shown = ", ".join(f"{loss:.9g}" for loss in result.losses)
    return f"| {name} | {result.exit_code} | {result.seconds:.1f}{ended} | {steps[0]} | {steps[1]} | {shown} |"


def _start(options: argparse.Namespace, name: str, run: Run, directory: Path) -> Result:
    """Train with torchrun in `directory`."""
    directory.mkdir()
    write_dataset(directory / "corpus")
    logs, failed = directory / "logs", directory / "failed"
    traces = []
    if options.traces is not None and run.ranks > 1 and not run.rank_1_fails:
        folder = options.traces.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        traces = ["--traces", str(folder)]
    started = time.time()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.ranks}"),
            *("--redirects", "3", "--log-dir", str(logs)),
            *(__file__, "--device", options.device, "--backend", options.backend, "--timeout", str(options.timeout)),
            *("--directory", str(directory), "--only", name, *traces, *options.overrides),
        ],
        env={**os.environ, **RECORDER_SETTINGS, **SHARED_GPU, **run.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    ended = time.time()
    records = [record for record in read_records(directory / "run" / "metrics.jsonl") if "loss" in record]
    return Result(
        exit_code=done.returncode,
        seconds=ended - started,
        step_seconds=[record["step_time_s"] for record in records],
        losses=losses(records),
        ended_after=ended - failed.stat().st_mtime if failed.exists() else None,
        output="\n".join(_last_lines(path) for path in sorted(logs.glob("**/std*.log"))),
    )


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"-- rank {log.parent.name}, {log.stem}", *lines[-_REPORT:]])


def _train_on_rank(options: argparse.Namespace) -> None:
    """Train as one of the ranks that torchrun has started."""
    _end_in_time(options.timeout)
    run = RUNS[options.only[0]]
    if options.backend == STAGED and run.ranks > 1:
        register_staged()
        dist.init_process_group(STAGED)
    if options.device == "cuda" and run.environment:
        _apply_to_cuda(run.environment)
    with ExitStack() as changes:
        if run.rank_1_fails and os.environ["RANK"] == "1":
            failing = _failing(options.directory / "failed")
            changes.enter_context(mock.patch.object(engine.train.trainer, "train_step", failing))
        if options.traces is not None:
            traced = _traced(options.traces / f"rank{os.environ['RANK']}.json.gz")
            changes.enter_context(mock.patch.object(engine.train.trainer, "train_step", traced))
        if not run.warms_up:
            changes.enter_context(mock.patch.object(engine.train.warm_up, "first_use_waits", lambda device: False))
        train(_config(options, run))


def _apply_to_cuda(environment: Mapping[str, str]) -> None:
    """Make CUDA read these variables, and hide them from the engine, which refuses pipeline stages with one queue."""
    torch.zeros(1, device=choose_device("cuda", int(os.environ["LOCAL_RANK"])))
    for name in environment:
        del os.environ[name]


def _end_in_time(timeout_s: float) -> None:
    """End this rank after `timeout_s` with its last calls and its stacks, whatever it waits for.

    torchrun terminates the other ranks then; one that has not installed a handler of its own shows its stacks as well.
    """
    faulthandler.register(signal.SIGTERM, chain=True)
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    rank = os.environ["RANK"]
    calls = threading.Timer(
        0.9 * timeout_s, lambda: print(f"rank {rank} last called:", *recorded_calls(), sep="\n", file=sys.stderr)
    )
    calls.daemon = True
    calls.start()


def _config(options: argparse.Namespace, run: Run) -> Config:
    hidden = _HIDDEN_SIZE[options.device]
    sizes = (
        "--model.hidden_size",
        str(hidden),
        "--model.intermediate_size",
        str(2 * hidden),
        "--model.num_layers",
        "4",
    )
    batch = ("--data.seq_length", "256", "--batch.global", "8", "--batch.micro", "1")
    end = ("--train.eval_interval", "0", "--checkpoint.interval", "0", "--run.device", options.device)
    return run_config(options.directory, *sizes, *batch, *end, *run.settings, *options.overrides, steps=_STEPS)


def _traced(path: Path) -> Any:
    """A `train_step` that records all steps but the first two, and writes the trace to `path` after the last."""
    train_step = engine.train.step.train_step
    steps = schedule(wait=1, warmup=1, active=_STEPS - 2, repeat=1)
    profiler = profile(schedule=steps, on_trace_ready=lambda done: done.export_chrome_trace(str(path)))

    def step_and_record(*arguments: Any, step: int, **options: Any) -> Any:
        if step == 1:
            profiler.start()
        result = train_step(*arguments, step=step, **options)
        if step == _STEPS and torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels that have not run are not in the trace
        profiler.step()
        return result

    return step_and_record


def _failing(note: Path) -> Any:
    """A `train_step` that writes the file `note` and raises in step 2."""
    train_step = engine.train.step.train_step

    def step_or_fail(*arguments: Any, step: int, **options: Any) -> Any:
        if step == _FAILS_IN:
            note.touch()
            raise RuntimeError(f"planted in step {step} of rank 1")
        return train_step(*arguments, step=step, **options)

    return step_or_fail


if __name__ == "__main__":
    run_program(main)

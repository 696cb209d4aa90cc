"""Runs the stages of tools/bench/gpu/stages.py, each in a process of its own, and reports what they measured.

    bash tools/bench/gpu.sh --list
    bash tools/bench/gpu.sh [--bundle DIR] [--budget MINUTES] [--stages NAME ...] [--results DIR] [--against PATH]
    bash tools/bench/gpu.sh --report --results DIR --into docs/measurements.md

A stage leaves DIR/STAGE.json and STAGE.log whatever ends it. A stage that fails, hangs or cannot run does not stop the
others; the last line and the exit code say which did. Only the standard library and PyTorch are needed to start.
"""

import argparse
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tools.bench.gpu import nccl
from tools.bench.gpu.process import Ended, run
from tools.bench.gpu.stages import LIMIT_S, ROOT, Scale, Stage, stages
from tools.bench.results import load, save

ENVIRONMENT = "environment"
REPORT_LIMIT_S = 120
DONE, FAILED, NOT_RUN = "done", "failed", "not run"
LAST_LINES = 40  # of the output of a stage that failed, in its file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see the module's docstring."""
    options = _arguments(arguments)
    scale = Scale("cpu", "tiny") if options.rehearse else Scale(preset=options.preset)
    if options.list:
        for stage in _chosen(options, scale, None):
            print(f"{stage.name:32}{stage.estimate_s:5} s  {stage.decides}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of processes that are ended at their limit
    results: Path = options.results
    results.mkdir(parents=True, exist_ok=True)
    statuses: dict[str, str] = {}
    interrupted = False
    try:
        if not options.report:
            _run_all(options, scale, statuses)
    except KeyboardInterrupt:
        interrupted = True
    reported = _report(options, scale)
    return 130 if interrupted else _summarize(statuses) or reported


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _usage_error  # type: ignore[method-assign]
    parser.add_argument("--list", action="store_true", help="list the stages with their predicted seconds, and end")
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", help="only these, or all that begin so: step, tests, kernels"
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start only stages that fit into this time")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu"), metavar="DIR", help="(default: runs/gpu)")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="made by gpu.sh --make-bundle DIR")
    parser.add_argument(
        "--against", type=Path, metavar="PATH", help="print the changes since this run: a folder or file"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="also write the tables to this document")
    parser.add_argument("--report", action="store_true", help="run nothing: report the results that are there")
    parser.add_argument("--preset", default="llama2-7b", help="model of the whole steps (default: llama2-7b)")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny: to try the programs, not to measure")
    options = parser.parse_args(arguments)
    for flag, path in {"--bundle": options.bundle, "--against": options.against, "--into": options.into}.items():
        if path is not None and not path.exists():
            parser.error(f"{flag} {path}: no such file or folder")
    return options


def _usage_error(message: str) -> NoReturn:
    print(f"error: {message}; see --help", file=sys.stderr)
    sys.exit(64)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _chosen(options: argparse.Namespace, scale: Scale, library: Path | None) -> list[Stage]:
    """Select the stages of these names; where none has a name, those that begin with it."""
    known = stages(scale, library)
    wanted = set()
    for name in options.stages or ():
        exact = {stage.name for stage in known if stage.name == name}
        found = exact or {stage.name for stage in known if stage.name.startswith(f"{name}-")}
        if not found:
            _usage_error(f"--stages {name}: expected one of {', '.join(stage.name for stage in known)}")
        wanted |= found
    return [stage for stage in known if not options.stages or stage.name in wanted]


def _run_all(options: argparse.Namespace, scale: Scale, statuses: dict[str, str]) -> None:
    started = time.monotonic()
    library = None if options.bundle is None else nccl.unpacked(options.bundle.resolve())
    chosen = _chosen(options, scale, library)
    lacks = _prepare(options, statuses)
    if library is None:
        lacks["nccl"] = "ranks that share a GPU need NCCL 2.30, which a --bundle has"
    for number, stage in enumerate(chosen, 1):
        left = float("inf") if options.budget is None else options.budget * 60 - (time.monotonic() - started)
        why_not = [f"no {need}: {lacks[need]}" for need in stage.needs if need in lacks]
        if stage.estimate_s > left:
            why_not.append(f"it needs about {stage.estimate_s} s, and {max(0.0, left):.0f} s of --budget are left")
        rest = sum(other.estimate_s for other in chosen[number - 1 :])
        print(
            f"== {number}/{len(chosen)} {stage.name}: about {stage.estimate_s} s, all that is left {rest / 60:.0f} min"
        )
        statuses[stage.name] = (
            _skip(options, stage, why_not[0]) if why_not else _run(options, stage, min(LIMIT_S, left))
        )


def _prepare(options: argparse.Namespace, statuses: dict[str, str]) -> dict[str, str]:
    """Run the stage `environment` and return what the machine lacks."""
    command = ["-m", "tools.bench.gpu.environment"]
    command += [] if options.bundle is None else ["--bundle", str(options.bundle.resolve())]
    print(f"== {ENVIRONMENT}")
    status = _run(options, Stage(ENVIRONMENT, "what runs here", command, 60), LIMIT_S)
    if status != DONE:
        statuses[ENVIRONMENT] = status
    everything = dict.fromkeys({need for stage in stages(Scale()) for need in stage.needs}, "see the stage environment")
    lacks: dict[str, str] = load(_file(options, ENVIRONMENT)).get("lacks", everything)
    return lacks


def _file(options: argparse.Namespace, name: str) -> Path:
    file: Path = options.results.resolve() / f"{name}.json"
    return file


def _skip(options: argparse.Namespace, stage: Stage, why: str) -> str:
    file = _file(options, stage.name)
    print(f"== {stage.name} is not run: {why}", flush=True)
    if not load(file)["rows"]:
        record = {"name": stage.name, "decides": stage.decides, "status": NOT_RUN, "problem": why}
        save(file, {"machine": {}, "rows": {}, "stage": record})
    return f"{NOT_RUN}: {why}"


def _run(options: argparse.Namespace, stage: Stage, limit_s: float) -> str:
    """Run a stage; its file says before, during and afterwards what is known."""
    file = _file(options, stage.name)
    command = [sys.executable, *stage.command, "--json", str(file)]
    command += [] if options.commit is None else ["--commit", options.commit]
    record = {"name": stage.name, "decides": stage.decides, "command": command[1:], "limit_s": limit_s}
    save(file, {"machine": {}, "rows": {}, "stage": record | {"status": "started"}})
    try:
        ended = run(command, stage.environment, limit_s, file.with_suffix(".log"))
    except KeyboardInterrupt:
        save(file, load(file) | {"stage": record | {"status": FAILED, "problem": "interrupted"}})
        raise
    record |= {"status": FAILED if ended.problem else DONE, "seconds": round(ended.seconds, 1)}
    if ended.problem:
        record |= {"problem": ended.problem, "output": ended.output.splitlines()[-LAST_LINES:]}
    save(file, load(file) | {"stage": record})
    status = f"{FAILED}: {ended.problem}{_wrong_rows(file)}" if ended.problem else DONE
    print(f"== {stage.name}: {status} after {ended.seconds:.0f} s", flush=True)
    return status


def _wrong_rows(file: Path) -> str:
    """Name the rows that failed, and how many were not run."""
    rows = load(file)["rows"]
    failed = [name for name, row in rows.items() if "error" in row]
    waiting = sum(row.get("outcome") == NOT_RUN for row in rows.values())
    said = [f"{len(failed)} of {len(rows)}: {'; '.join(failed[:5])}"] if failed else []
    said += [f"{waiting} {NOT_RUN}"] if waiting else []
    return f" ({', '.join(said)})" if said else ""


def _report(options: argparse.Namespace, scale: Scale) -> int:
    command = ["-m", "tools.bench.gpu.report", "--results", str(options.results), "--preset", scale.preset]
    for flag, path in {"--against": options.against, "--into": options.into}.items():
        command += [] if path is None else [flag, str(path)]
    ended: Ended = run([sys.executable, *command], {}, REPORT_LIMIT_S, options.results / "report.log")
    if ended.problem:
        print(f"error: no report: {ended.problem}", file=sys.stderr)
    return 1 if ended.problem else 0


def _summarize(statuses: dict[str, str]) -> int:
    """Print how every stage ended; 1 if one was not done."""
    print()
    for name, status in statuses.items():
        print(f"{name:32}{status}")
    wrong = {kind: [n for n, s in statuses.items() if s.startswith(kind)] for kind in (FAILED, NOT_RUN)}
    for kind, names in wrong.items():
        if names:
            print(f"error: {kind}: {' '.join(names)}", file=sys.stderr)
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    if Path.cwd() != ROOT:
        sys.exit(f"error: start tools/bench/gpu.sh, or this in {ROOT}")
    sys.exit(main())

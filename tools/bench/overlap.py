"""Share of communication that is hidden behind computation, read from traces of torch.profiler.

    python tools/bench/overlap.py traces/rank*.json.gz --json overlap.json

A trace is what `export_chrome_trace` writes, one for each rank, compressed or not. It needs a GPU and NCCL, whose
kernels carry the description of their process group, and both ProfilerActivity.CPU (for that description) and CUDA:
gloo communicates on host threads, and its events name no group. The engine's groups are described by their axis.

Communication is the union of NCCL's kernels, computation that of all other kernels; hidden is where both run. A kernel
of NCCL also waits for its peers, and for pp that includes the bubble, so the exposed time is more than the transfer.
"Behind matmuls" counts GEMM kernels only. Alternative considered: HolisticTraceAnalysis, whose one figure (all axes
together) is the same, but it does not tell axes apart and needs jupyterlab, pandas and plotly.
"""

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from engine.errors import ConfigError, DataError, run_program
from engine.parallel.layout import CHANNELS

ALL = "all"
"""The row of all axes together, which may overlap each other."""
_NCCL = re.compile(r"nccl(Dev)?Kernel")
_MATMUL = re.compile(r"nvjet|gemm|xmma|fp8_matmul|splitk", re.IGNORECASE)
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

Interval = tuple[float, float]
"""Start and end, in µs."""


@dataclass(frozen=True)
class Activity:
    """What a rank's GPU did: lists of disjoint intervals in order, or for `communication` one list for each axis."""

    rank: int
    communication: Mapping[str, Sequence[Interval]]
    launches: Mapping[str, int]
    compute: Sequence[Interval]
    matmuls: Sequence[Interval]
    busy: Sequence[Interval]


@dataclass(frozen=True)
class Overlap:
    """Communication of one rank on one axis, in ms.

    Attributes:
        launches: NCCL kernels.
        hidden_ms: of `total_ms`, while another kernel computed.
        behind_matmuls_ms: of `total_ms`, while a matmul ran.
    """

    rank: int
    axis: str
    launches: int
    total_ms: float
    hidden_ms: float
    behind_matmuls_ms: float

    @property
    def exposed_ms(self) -> float:
        return self.total_ms - self.hidden_ms


@dataclass(frozen=True)
class Usage:
    """Time of one rank's GPU from its first to its last activity, in ms.

    Attributes:
        exposed_ms: communication alone.
        idle_ms: nothing ran, not even a copy.
    """

    rank: int
    total_ms: float
    compute_ms: float
    exposed_ms: float
    idle_ms: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="of each rank: .json or .json.gz")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    found = [read_activity(path, number) for number, path in enumerate(options.traces)]
    for line in table(found):
        print(line)
    if options.json is not None:
        rows = [asdict(row) for activity in found for row in overlaps(activity)]
        document = {"overlap": rows, "usage": [asdict(usage(activity)) for activity in found]}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


def read_activity(path: Path, number: int = 0) -> Activity:
    """Read a trace; `number` is the rank if the trace does not say it.

    Raises:
        DataError: the file is no trace.
        ConfigError: the trace has no kernels of NCCL.
    """
    try:
        content = path.read_bytes()
        trace = orjson.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("cat") in _GPU]
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a trace of torch.profiler: {error}") from None
    info = trace.get("distributedInfo", {})
    activity = activity_of(events, _descriptions(info), info.get("rank", number))
    if not activity.communication:
        raise ConfigError(
            f"{path}: {len(events)} GPU activities, none of them a kernel of NCCL; record ranks that communicate over "
            "NCCL, with ProfilerActivity.CPU and ProfilerActivity.CUDA"
        )
    return activity


def activity_of(events: Iterable[Mapping[str, Any]], descriptions: Mapping[str, str], rank: int) -> Activity:
    """Sort GPU events of a trace; `descriptions` of process groups by name, for kernels that have only the name."""
    communication, compute, matmuls, busy = defaultdict(list), [], [], []
    for event in events:
        interval = event["ts"], event["ts"] + event["dur"]
        busy.append(interval)
        if event["cat"] != "kernel":
            continue
        if _NCCL.match(event["name"]):
            communication[_axis(event.get("args", {}), descriptions)].append(interval)
            continue
        compute.append(interval)
        if _MATMUL.search(event["name"]):
            matmuls.append(interval)
    return Activity(
        rank,
        {axis: union(intervals) for axis, intervals in communication.items()},
        {axis: len(intervals) for axis, intervals in communication.items()},
        union(compute),
        union(matmuls),
        union(busy),
    )


def _descriptions(info: Mapping[str, Any]) -> dict[str, str]:
    return {group["pg_name"]: group["pg_desc"] for group in info.get("pg_config", [])}


def _axis(args: Mapping[str, Any], descriptions: Mapping[str, str]) -> str:
    """The axis of a kernel's process group; the channels between pipeline stages are pp."""
    name = str(args.get("Process Group Name", ""))
    described = str(args.get("Process Group Description", "") or descriptions.get(name, "")) or f"group {name}"
    return "pp" if described in CHANNELS else "world" if described == "default_pg" else described


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge intervals that touch or overlap."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Add up disjoint intervals."""
    return sum(end - start for start, end in intervals)


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Return the time that two lists of disjoint intervals, each in order, have in common."""
    common, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        common += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def overlaps(activity: Activity) -> list[Overlap]:
    """Return the overlap on each axis, and of all axes together as the last."""
    axes = dict(sorted(activity.communication.items()))
    together = union(interval for intervals in axes.values() for interval in intervals)
    counts = {**activity.launches, ALL: sum(activity.launches.values())}
    return [
        Overlap(
            activity.rank,
            axis,
            counts[axis],
            length(intervals) / 1e3,
            intersection(intervals, activity.compute) / 1e3,
            intersection(intervals, activity.matmuls) / 1e3,
        )
        for axis, intervals in [*axes.items(), (ALL, together)]
    ]


def usage(activity: Activity) -> Usage:
    """Return how the time of the rank's GPU was spent."""
    total = activity.busy[-1][1] - activity.busy[0][0]
    exposed = overlaps(activity)[-1].exposed_ms
    return Usage(
        activity.rank, total / 1e3, length(activity.compute) / 1e3, exposed, (total - length(activity.busy)) / 1e3
    )


def table(activities: Sequence[Activity]) -> Iterable[str]:
    """Yield a Markdown table of all ranks and axes, and a line on each rank's time."""
    yield "| rank | axis | NCCL kernels | ms | hidden, ms | exposed, ms | hidden | behind matmuls |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in (row for activity in activities for row in overlaps(activity)):
        shares = [f"{part / (row.total_ms or 1):.0%}" for part in (row.hidden_ms, row.behind_matmuls_ms)]
        times = [f"{time:,.2f}" for time in (row.total_ms, row.hidden_ms, row.exposed_ms)]
        yield f"| {' | '.join([str(row.rank), row.axis, f'{row.launches:,}', *times, *shares])} |"
    yield ""
    for spent in map(usage, activities):
        parts = {"computing": spent.compute_ms, "only communicating": spent.exposed_ms, "idle": spent.idle_ms}
        shares = [f"{name} {part / spent.total_ms:.1%}" for name, part in parts.items()]
        yield f"rank {spent.rank}: {spent.total_ms:,.1f} ms, {', '.join(shares)}"


if __name__ == "__main__":
    run_program(main)

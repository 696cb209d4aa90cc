"""Compare every kernel on a GPU with its target, a device copy of the same size, and the best installed alternative.

    python tools/bench/kernels.py                                     # all rows, some minutes
    python tools/bench/kernels.py --only RMSNorm 'FP8 GEMM' --json kernels.json
    python tools/bench/kernels.py --results kernels.json --into docs/measurements.md

A row is checked against its reference, then timed: a CUDA graph of calls that alternate between four sets of random
buffers (together many times the size of the L2 cache) is replayed 50 times without waiting between replays; the median
is reported. The alternatives (PyTorch, torch.compile, flash-attn, apex, Transformer Engine) run in the same process in
the same way. Rows are measured in a process of their own, and in a new one behind a row that leaves the GPU unusable or
ends the process: an illegal instruction costs the row that caused it, which is named. `--results` prints earlier
results, or writes them to a document between its two markers; rows without a result stay empty. Alternative considered:
timing each call, which measures the launch if the kernel is shorter.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config

from engine.errors import ConfigError, run_program
from engine.ops import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import kernel_cases
from tools.bench.kernel_cases import Call, Case, case_of
from tools.bench.kernel_table import (
    Row,
    cells,
    key,
    read,
    rows,
    section,
    source,
    table,
    write_between_markers,
)
from tools.bench.results import Results

ROTATIONS, SAMPLES = 5, 50
MATMUL = 8192  # rows and columns of the bf16 matmul measured for comparison
LARGEST_COPY = 16 * 10**9  # bytes; the time of larger ones is extrapolated
CONTEXT: SpawnContext | ForkContext = multiprocessing.get_context("spawn")  # a process that uses CUDA cannot be forked
GAVE_UP = 3  # exit code of a process that has sent all results it can give


def samples(calls: Sequence[Call], refresh: Call | None = None) -> list[float]:
    """Time each replay of a CUDA graph of all calls; return the seconds per call."""
    rotations = 1 if refresh or len(calls) == 1 else ROTATIONS
    for call in [*calls, *calls, *calls]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rotations):
            results = [call() for call in calls]  # each call has separate outputs, as it has separate inputs
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(SAMPLES + 5)]
    for start, end in marks:  # without synchronization, so that the device queue is never empty
        if refresh is not None:
            refresh()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del results
    return [start.elapsed_time(end) / 1000 / (rotations * len(calls)) for start, end in marks[5:]]


def copy_seconds(size: int) -> float:
    """Return the seconds of a device copy that moves `size` bytes, half read and half written.

    It copies elements of 8 bytes: a copy of 2^31 elements or more runs at two thirds of the speed.
    """
    once = min(size, LARGEST_COPY)
    count = kernel_cases.SETS if once < 2 * 10**9 else 1
    options = {"dtype": torch.int64, "device": kernel_cases.DEVICE}
    elements = -(-once // 16)
    pairs = [[torch.randint(2**62, (elements,), **options) for _ in range(2)] for _ in range(count)]  # type: ignore[call-overload]
    return statistics.median(samples([partial(a.copy_, b) for a, b in pairs])) * size / (16 * elements)


def measure(row: Row) -> dict[str, Any]:
    """Measure a row: seconds of our kernel, of a copy, and of each alternative (or why it did not run); or an error."""
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    try:
        if row.unit != "TFLOP/s":
            result["copy"] = copy_seconds(row.work)
        torch.cuda.empty_cache()
        case = case_of(row)
        case.check()
        times = sorted(time / case.share for time in samples(case.calls, case.refresh))
        result |= {"seconds": statistics.median(times), "range": [times[0], times[-1]], "share": case.share}
    except Exception as error:  # continue with the other rows
        return {"error": _first_line(error)}
    result["others"] = {name: _alternative(make, case) for name, make in case.others.items()}
    return result


def _alternative(make: Callable[[], list[Call]], case: Case) -> float | str:
    try:
        return statistics.median(samples(make(), case.refresh)) / case.share
    except Exception as error:  # an error of another package, or out of memory; reported in its line
        return _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def machine(commit: str | None) -> dict[str, Any]:
    """Describe the machine, with the copy and matmul ceilings of the device."""
    a, b = (torch.randn(MATMUL, MATMUL, device=kernel_cases.DEVICE).bfloat16() for _ in range(2))
    seconds = statistics.median(samples([partial(torch.mm, a, b)]))
    ceilings = {"copy_tb_s": 8 * 10**9 / copy_seconds(8 * 10**9) / 1e12, "bf16_tflops": 2 * MATMUL**3 / seconds / 1e12}
    return source(commit) | ceilings


def run(chosen: Sequence[Row], commit: str | None, file: Path | None) -> dict[str, Any]:
    """Measure the rows: {"machine": …, "rows": {key: result}}. The file is updated after each row."""
    results = Results(file, {})
    for row, result in results_of(chosen, commit):
        if row is None:
            if "error" in result:
                raise RuntimeError(f"the ceilings of this GPU cannot be measured: {result['error']}")
            results.describe(result)
            continue
        results.add(key(row), result)
        print("  ".join(cells(row, result)), flush=True)
        for name, time in result.get("others", {}).items():
            print(f"    {name}: {time if isinstance(time, str) else f'{time * 1e6:,.1f} µs'}")
    return {"machine": results.machine, "rows": results.rows}


def results_of(chosen: Sequence[Row], commit: str | None) -> Iterator[tuple[Row | None, dict[str, Any]]]:
    """Measure in other processes: yield (None, the machine), then each row with its result."""
    waiting: list[Row | None] = [None, *chosen]
    while waiting:
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_measure_rows, args=(sender, waiting, commit))
        process.start()
        sender.close()
        done = 0
        try:
            while done < len(waiting):
                yield waiting[done], receiver.recv()
                done += 1
        except EOFError:  # the process has ended, perhaps as it should: behind an error
            process.join()
            if process.exitcode != GAVE_UP:
                code = process.exitcode or 0
                how = f"{'signal' if code < 0 else 'exit code'} {abs(code)}"
                yield waiting[done], {"error": f"its process ended with {how}"}
                done += 1
        finally:
            process.terminate()  # all results are there, or nobody waits for them
            process.join()
        waiting = waiting[done:]


def _measure_rows(sender: Connection, waiting: Sequence[Row | None], commit: str | None) -> None:
    """Measure the machine, if it stands first, and rows, and send the results, until the GPU is unusable."""
    functorch_config.donated_buffer = False  # backward passes run repeatedly
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot capture the default stream
        for row in waiting:
            sender.send(machine(commit) if row is None else measure(row))
            if not _gpu_is_usable():
                os._exit(GAVE_UP)  # without cleaning up, which would fail as well
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


def _gpu_is_usable() -> bool:
    """Whether no call has left the GPU in an error that all later calls of this process would have, too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see `--help`."""
    options = _parser().parse_args(arguments)
    if options.results is not None and (options.only or options.json):
        raise ConfigError("--results measures nothing: leave out --only and --json")
    if options.results is None:
        chosen = choose(options.only)
        require_kernels()
        documents = [run(chosen, options.commit, options.json)]
    else:
        documents = [read(path) for path in options.results]
    results = {name: result for document in documents for name, result in document["rows"].items()}
    print(f"\n{section(documents) if options.markdown else table(results, markdown=False)}")
    if options.into is not None:
        write_between_markers(options.into, section(documents))
    return 1 if options.results is None and any("error" in result for result in results.values()) else 0


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n    ")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n    {rest.partition(chr(10) * 2)[0]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name contains one of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--results", type=Path, nargs="*", metavar="FILE", help="show these results; measure nothing")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the table between the markers of a document")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    return parser


def choose(names: Sequence[str] | None) -> list[Row]:
    """Select the rows to measure: of each given name the row that is called so, or else all that contain it.

    Raises:
        ConfigError: no row name contains one of the given names.
    """
    measured = rows()
    chosen = set[str]()
    for name in names or ():
        exact = {key(row) for row in measured if key(row) == name}
        found = exact or {key(row) for row in measured if name.lower() in key(row).lower()}
        chosen |= found
        if not found:
            known = ", ".join(dict.fromkeys(row.name for row in measured))
            raise ConfigError(f"--only {name}: no row name contains it; expected one of {known}")
    return [row for row in measured if not names or key(row) in chosen]


def require_kernels() -> None:
    """Check the device.

    Raises:
        ConfigError: no GPU, or csrc has no kernels.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "this measures kernels on a GPU, and torch finds none; --results shows what was measured before"
        )
    if not native.has_kernels():
        why = native.WHY_NOT or "csrc was built without CUDA"
        raise ConfigError(f"no kernels to measure: {why}; build them with TRIAXIS_CUDA=on pip install -e .")


if __name__ == "__main__":
    run_program(main)

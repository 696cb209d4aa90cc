"""Measure what a GPU sustains: matmuls of 8192³ and copies, in a burst and for seconds, with clocks and watts.

    python tools/bench/sustained.py --json sustained.json
    python tools/bench/sustained.py --device cpu --size 256 --seconds 0.01

A kernel that runs for seconds heats the card and meets its power limit; one that is timed alone does not. A training
step is the former, so its bound is computed from the longest of these runs (tools/bench/gpu/bound.py).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError, run_program
from engine.ops.fp8 import scaled_matmul
from engine.ops.quantize import BLOCK_1X128, BLOCK_128X128, TENSORWISE, QuantizedTensor, Scaling, quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import power
from tools.bench.kernel_table import source
from tools.bench.results import Results

IDLE_S = 1.0  # before each run
E4M3 = torch.float8_e4m3fn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see the module's docstring."""
    options = _arguments(arguments)
    results = Results(options.json, source(options.commit))
    for name, unit, work, make in workloads(options.size, options.device):
        try:
            call = make()
            call()
            found = [run(call, work, seconds, options.device) for seconds in options.seconds]
        except (RuntimeError, ValueError, NotImplementedError) as error:  # go on with the other workloads
            results.add(f"{name}, sustained", {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            print(f"{name}: {error}", flush=True)
            continue
        for seconds, result in zip(options.seconds, found, strict=True):
            results.add(f"{name}, {seconds:g} s", result | {"unit": unit})
            print(f"{name}, {seconds:g} s: {result['value']:,.4g} {unit}; {result['power']}", flush=True)
    return 1 if any("error" in row for row in results.rows.values()) else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices (default: 8192)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.077, 2.0], help="(default: 0.077 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; use --device cpu with a small --size")
    return options


def workloads(size: int, device: str) -> Iterator[tuple[str, str, float, Callable[[], Callable[[], Any]]]]:
    """Yield name, unit, work of a call in that unit times seconds, and what makes the call."""
    torch.manual_seed(0)
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    teraflops = 2 * size**3 / 1e12
    yield f"bf16 matmul {size}³", "TFLOP/s", teraflops, lambda: partial(torch.mm, x, y.t())
    kinds: dict[str, tuple[Scaling, Scaling]] = {
        "tensorwise": (TENSORWISE, TENSORWISE),
        "blockwise": (BLOCK_1X128, BLOCK_128X128),
    }
    for kind, scalings in kinds.items():
        yield f"FP8 {kind} matmul {size}³", "TFLOP/s", teraflops, partial(_fp8_matmul, (x, y), scalings)
    yield "device copy", "TB/s", 2 * x.nbytes / 1e12, lambda: partial(y.copy_, x)


def _fp8_matmul(operands: tuple[Tensor, Tensor], scalings: tuple[Scaling, Scaling]) -> Callable[[], Tensor]:
    a, b = (_quantized(x, scaling) for x, scaling in zip(operands, scalings, strict=True))
    return lambda: scaled_matmul(a, b, torch.bfloat16)


def _quantized(x: Tensor, scaling: Scaling) -> QuantizedTensor:
    scale = (torch.finfo(E4M3).max / x.abs().amax().float()).view(1) if scaling == TENSORWISE else None
    result, _ = quantize(x, E4M3, scaling, scale=scale)
    assert result is not None
    return result


def run(call: Callable[[], Any], work: float, seconds: float, device: str) -> dict[str, Any]:
    """Call for about `seconds` without a pause: {"value": work per second, "calls", "seconds", "power"}."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    started = time.perf_counter()
    for _ in range(3):
        call()
    wait()
    calls = max(1, round(seconds / ((time.perf_counter() - started) / 3)))
    time.sleep(IDLE_S if device == "cuda" else 0)
    with power.sampled(device) as sampled:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        taken = time.perf_counter() - started
    return {"value": calls * work / taken, "calls": calls, "seconds": taken, "power": sampled}


if __name__ == "__main__":
    run_program(main)

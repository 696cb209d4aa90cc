"""Compare cuBLASLt's algorithms for the FP8 matmuls of a 7B: the one that its heuristic puts first, and the fastest.

    python tools/bench/fp8_algorithms.py                 # about 10 s on an H200
    python tools/bench/fp8_algorithms.py --json algorithms.json

All candidates of a matmul take turns, and the medians of their times are compared. "chosen" is what a run would take
(`ops.measure`): it measures fewer rounds, and keeps the first unless another is clearly faster.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import run_program
from engine.ops.fp8 import add_scaled_matmul, scaled_matmul
from engine.ops.fp8_algorithms import Fp8Plans, Plan
from engine.ops.quantize import BLOCK_1X128, BLOCK_128X128, TENSORWISE, QuantizedTensor, Scaling, quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.kernel_table import FFN, HIDDEN, TOKENS, source
from tools.bench.kernels import require_kernels
from tools.bench.results import Results

DEVICE = "cuda"
LAYERS = ((HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2 * FFN), (FFN, HIDDEN))  # inputs, outputs
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDS = 15


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    args = parser.parse_args(arguments)
    require_kernels()
    plans, machine = Fp8Plans(), source(args.commit)
    results = Results(args.json, machine | {"cublaslt": plans.version})
    print(f"{machine['gpu']}, cuBLASLt {plans.version}, {TOKENS} tokens")
    print(f"{'matmul':32} {'m × n × k':>22} {'first':>9} {'fastest':>9} {'of':>3} {'chosen':>9}")
    for name, plan in _matmuls(plans):
        row = _measured(plans, plan)
        results.add(f"FP8 algorithms, {name}, {row['shape']}", row)
        text = "".join(f" {row[column]:6.0f} µs" for column in ("first_us", "fastest_us"))
        print(f"{name:32} {row['shape']:>22}{text} {row['candidates']:3} {row['value']:6.0f} µs", flush=True)
    rows = list(results.rows.values())
    print(f"all together: fastest {_sum(rows, 'fastest_us'):.2f}× and chosen {_sum(rows, 'value'):.2f}× the first")


def _sum(rows: list[dict[str, Any]], column: str) -> float:
    """The time of `column` over all rows, relative to that of the first candidates."""
    return float(sum(row[column] for row in rows) / sum(row["first_us"] for row in rows))


def _matmuls(plans: Fp8Plans) -> Iterator[tuple[str, Plan]]:
    """Run each matmul of a layer once, in both granularities, and yield its name and plan."""
    for inputs, outputs in LAYERS:
        yield from _three(plans, TENSORWISE, TENSORWISE, E5M2, inputs, outputs)
        if _scales_blocks():
            yield from _three(plans, BLOCK_1X128, BLOCK_128X128, E4M3, inputs, outputs)


def _scales_blocks() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


def _three(
    plans: Fp8Plans, scaling: Scaling, of_weight: Scaling, grad_dtype: torch.dtype, inputs: int, outputs: int
) -> Iterator[tuple[str, Plan]]:
    tensorwise = scaling == TENSORWISE
    grad, grad_t = (_operand(*shape, scaling, grad_dtype) for shape in ((TOKENS, outputs), (outputs, TOKENS)))
    x, x_t = (_operand(*shape, scaling, E4M3) for shape in ((TOKENS, inputs), (inputs, TOKENS)))
    weight, weight_t = (_operand(*shape, of_weight, E4M3) for shape in ((outputs, inputs), (inputs, outputs)))
    for name, run in (
        ("forward", lambda: scaled_matmul(x, weight, torch.bfloat16, fast=tensorwise, impl="cublaslt")),
        ("input gradient", lambda: scaled_matmul(grad, weight_t, torch.bfloat16, impl="cublaslt")),
        ("weight gradient", lambda: _add(grad_t, x_t)),
    ):
        before = set(plans.existing())
        run()
        for plan in set(plans.existing()) - before:  # none if another layer has the same shape
            yield f"{'tensorwise' if tensorwise else 'blockwise'}, {name}", plan


def _add(a: QuantizedTensor, b: QuantizedTensor) -> None:
    out = torch.zeros(a.values.shape[0], b.values.shape[0], device=DEVICE)
    add_scaled_matmul(out, a, b, impl="cublaslt")


def _operand(rows: int, columns: int, scaling: Scaling, dtype: torch.dtype) -> QuantizedTensor:
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.full((1,), 64.0, device=DEVICE) if scaling == TENSORWISE else None
    result, _ = quantize(x, dtype, scaling, scale=scale, power_of_two=scale is None)
    assert result is not None
    return result


def _measured(plans: Fp8Plans, plan: Plan) -> dict[str, Any]:
    chosen, candidates, seconds = plans.measure(plan), plans.candidates(plan), plans.timer(plan)
    times = [[seconds(candidate) for candidate in candidates] for _ in range(ROUNDS)]
    medians = [1e6 * statistics.median(of_one) for of_one in zip(*times, strict=True)]
    return {
        "value": medians[candidates.index(chosen)],
        "unit": "µs",
        "shape": f"{plan.m}×{plan.n}×{plan.k}",
        "candidates": len(candidates),
        "first_us": medians[0],
        "fastest_us": min(medians),
        "all_us": medians,
    }


if __name__ == "__main__":
    run_program(main)

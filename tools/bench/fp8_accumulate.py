"""Prove that the custom FP8 matmul adds right: 0 + matmul equals the matmul that does not add, bit for bit.

    python tools/bench/fp8_accumulate.py                 # 60 runs with each scaling, about 10 s on an H200
    python tools/bench/fp8_accumulate.py --runs 1000

Both do the same arithmetic in the same order, so there is no reference and no tolerance. If they differ, the program
says in how many runs, in which warps, columns and rows, and explains the first errors: the block of 128 along k whose
contribution the error is a multiple of, and that multiple. A scale of the block that the ring copies next to the same
place, 5 blocks later, would make it scale(k + 5) / scale(k) - 1. Exit code 1: something differs.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError, run_program
from engine.ops.quantize import BLOCK_1X128, BLOCK_128X128, BLOCK_SIZE, QuantizedTensor, Scaling, quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.kernel_table import source
from tools.bench.kernels import require_kernels
from tools.bench.results import Results

STAGES = 5  # of the ring of csrc/gemm/fp8_sm90.cu
ROWS_OF_WARP, ROWS_OF_FRAGMENT, COLUMNS_OF_FRAGMENT, TILE_COLUMNS = 16, 8, 8, 128
EXPLAINED = 6  # errors
DEVICE = "cuda"


@dataclass
class Differences:
    """What differed, over all runs: numbers of runs and elements, and counts by place."""

    runs: int = 0
    elements: int = 0
    warps: Counter[tuple[int, int]] = field(default_factory=Counter)
    columns: Counter[int] = field(default_factory=Counter)
    rows: Counter[int] = field(default_factory=Counter)
    explained: list[str] = field(default_factory=list)

    def lines(self, total: int) -> Iterator[str]:
        """Yield the report on `total` runs."""
        yield f"  0 + matmul: {self.runs} of {total} runs differ"
        if not self.runs:
            return
        yield f"    {self.elements} elements, in {len(self.warps)} tiles of a warp (16 rows × 128 columns)"
        yield f"    by columns of 8 within 128: {dict(sorted(self.columns.items()))}"
        yield f"    by half of 16 rows: {dict(sorted(self.rows.items()))}"
        yield from (f"    {line}" for line in self.explained)


def operand(rows: int, k: int, scaling: Scaling) -> QuantizedTensor:
    """Draw E4M3 values. Each block of 128 along k, in each row, has its own magnitude: no scale can replace another."""
    blocks = -(-k // BLOCK_SIZE)
    sizes = torch.exp2(torch.randint(-6, 7, (rows, blocks), device=DEVICE).float())
    x = torch.randn(rows, k, device=DEVICE) * sizes.repeat_interleave(BLOCK_SIZE, 1)[:, :k]
    result, _ = quantize(x, torch.float8_e4m3fn, scaling)
    assert result is not None
    return result


def matmul(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """a·bᵀ in fp32 by the custom kernel."""
    given = (a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling)
    return torch.ops.triaxis.fp8_matmul_sm90(*given, torch.float32)


def add_matmul(out: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> None:
    """Add a·bᵀ to `out` by the custom kernel."""
    torch.ops.triaxis.fp8_matmul_sm90_add_(out, a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling)


def compare(a: QuantizedTensor, b: QuantizedTensor, runs: int) -> tuple[int, Differences]:
    """Return how many elements differ between two matmuls that do not add, and how sums on zeros differ from them."""
    expected, found = matmul(a, b), Differences()
    unequal = int((expected != matmul(a, b)).sum())
    out = torch.empty_like(expected)
    for _ in range(runs):
        add_matmul(out.zero_(), a, b)
        wrong = (out != expected).nonzero()
        if len(wrong):
            _count(found, wrong.cpu(), out, expected, (a, b))
    return unequal, found


def _count(
    found: Differences,
    wrong: Tensor,
    out: Tensor,
    expected: Tensor,
    operands: tuple[QuantizedTensor, QuantizedTensor],
) -> None:
    rows, columns = wrong[:, 0], wrong[:, 1]
    found.runs += 1
    found.elements += len(wrong)
    found.warps.update(zip((rows // ROWS_OF_WARP).tolist(), (columns // TILE_COLUMNS).tolist(), strict=True))
    found.columns.update((columns % TILE_COLUMNS // COLUMNS_OF_FRAGMENT).tolist())
    found.rows.update((rows % ROWS_OF_WARP // ROWS_OF_FRAGMENT).tolist())
    if len(found.explained) < EXPLAINED:
        row, first = int(rows[0]), int(columns[0]) // TILE_COLUMNS * TILE_COLUMNS
        tile = slice(first, first + TILE_COLUMNS)
        error = out[row, tile].double() - expected[row, tile].double()
        found.explained.append(explain(*operands, row, first, error))


def contribution(a: QuantizedTensor, b: QuantizedTensor, row: int, first: int, block: int) -> Tensor:
    """What block `block` along k adds to the tile of row `row` that starts at column `first`: float64 [≤ 128]."""
    along = slice(BLOCK_SIZE * block, BLOCK_SIZE * (block + 1))
    columns = slice(first, first + TILE_COLUMNS)
    b_scale = b.scale_inv[block, columns] if b.scaling == BLOCK_1X128 else b.scale_inv[first // BLOCK_SIZE, block]
    product = b.values[columns, along].double() @ a.values[row, along].double()
    return product * a.scale_inv[block, row].double() * b_scale.double()


def explain(a: QuantizedTensor, b: QuantizedTensor, row: int, first: int, error: Tensor) -> str:
    """Say of which block's contribution the error of a tile's row is a multiple, and what other scales would give."""
    wrong = error != 0
    parts = [contribution(a, b, row, first, block)[wrong] for block in range(a.scale_inv.shape[0])]
    error = error[wrong]
    cosines = [abs(float(error @ part / (error.norm() * part.norm()).clamp(min=1e-300))) for part in parts]
    block = max(range(len(parts)), key=cosines.__getitem__)
    part, later = parts[block], block + STAGES
    factor = float(error @ part / (part @ part))
    text = f"row {row}, columns from {first}: block {block} (cosine {cosines[block]:.4f}) times {factor:+.4g}"
    if later >= len(parts):
        return text
    expected = float(a.scale_inv[later, row] / a.scale_inv[block, row]) - 1
    return f"{text}; the scale of A of block {later} would make it {expected:+.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=60, metavar="N", help="runs with each scaling (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    parser.add_argument("--shape", type=int, nargs=3, default=(12288, 4096, 8192), metavar=("M", "N", "K"))
    options = parser.parse_args(arguments)
    if options.runs < 1:
        raise ConfigError(f"--runs {options.runs}: expected 1 or more")
    require_kernels()
    m, n, k = options.shape
    results = Results(options.json, source(options.commit))
    for scaling in (BLOCK_1X128, BLOCK_128X128):
        torch.manual_seed(0)
        unequal, found = compare(operand(m, k, BLOCK_1X128), operand(n, k, scaling), options.runs)
        print(f"B scaled {scaling}, {m}×{n}×{k}: two matmuls that do not add differ in {unequal} elements")
        print("\n".join(found.lines(options.runs)), flush=True)
        row = {"runs": options.runs, "wrong_runs": found.runs, "elements": found.elements, "unequal": unequal}
        if unequal or found.runs:
            row["error"] = (
                f"{found.runs} of {options.runs} runs wrong; two that do not add differ in {unequal} elements"
            )
        results.add(f"accumulate {scaling}", row)
    right = not any("error" in row for row in results.rows.values())
    print("right, bit for bit" if right else "WRONG: leave ops.fp8_matmul at auto or cublaslt")
    return 0 if right else 1


if __name__ == "__main__":
    run_program(main)

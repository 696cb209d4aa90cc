"""Rows of the table of GPU kernels: bytes or FLOPs of each, targets, and formatting of results.

This module needs no GPU, so that the table can be tested and printed anywhere. kernel_cases.py has the benchmarks.
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError, StorageError

TOKENS, HIDDEN, FFN, VOCABULARY, HEADS = 8192, 4096, 11008, 32000, 32
PARAMETERS = 6_738_415_616  # of Llama-2-7B
ADAMW_BYTES, ADAMW_STATE_BYTES = 30, 18  # moved, and stored, per parameter
BEGIN, END = "<!-- kernels: written by tools/bench/kernels.py -->", "<!-- kernels: end -->"
HEADER = ("what", "shape", "floor", "target", "bound", "this run", "rate", "device copy", "best alternative")
_MATRIX = TOKENS * HIDDEN * 2  # bytes in bf16
_FFN_MATRIX = TOKENS * FFN * 2


@dataclass(frozen=True)
class Row:
    """A row of the table. `work`: bytes moved, or FLOPs."""

    name: str
    shape: str
    unit: str
    floor: float
    target: float
    bound: float
    work: int


def rows() -> list[Row]:
    """List the rows. Floors are results of others; bounds: 4.3 TB/s (device copy on an H200) or its fastest matmuls."""
    matrix, tall = f"{TOKENS}×{HIDDEN} bf16", f"{TOKENS}×{FFN} bf16"
    table = [
        Row("RMSNorm forward", matrix, "µs", 39, 34.7, 31.2, 2 * _MATRIX),
        Row("residual add + RMSNorm", matrix, "µs", 78, 69, 62.4, 4 * _MATRIX),
        Row("RMSNorm backward + residual", matrix, "µs", 89, 73, 66, 4 * _MATRIX),
        Row("LayerNorm forward", matrix, "µs", 39, 35, 31, 2 * _MATRIX),
        Row("LayerNorm backward", matrix, "µs", 66, 55, 47, 3 * _MATRIX),
        Row("RMSNorm forward with amax", matrix, "µs", 39, 34.7, 31.2, 2 * _MATRIX),
        Row("RMSNorm to E4M3 1×128", matrix, "µs", 31, 26, 23.4, 3 * _MATRIX // 2),
        Row("quantize row + column, 1×128", matrix, "µs", 42, 35, 31.2, 2 * _MATRIX),
        Row("quantize row + column, one scale", matrix, "µs", 42, 35, 31.2, 2 * _MATRIX),
        Row("quantize row + column, scale from amax", matrix, "µs", 42, 35, 31.2, 2 * _MATRIX),
        Row("amax", matrix, "µs", 70, 18, 15.6, _MATRIX),
        Row("transpose E4M3, 1×128", f"{TOKENS}×{HIDDEN} E4M3", "µs", 390, 22, 15.6, _MATRIX),
        Row("transpose E4M3, one scale", f"{TOKENS}×{HIDDEN} E4M3", "µs", 190, 20, 15.6, _MATRIX),
        Row("SwiGLU forward", tall, "µs", 157, 140, 126, 3 * _FFN_MATRIX),
        Row("SwiGLU backward", tall, "µs", 262, 233, 210, 5 * _FFN_MATRIX),
        Row("SwiGLU backward to E5M2, row + column", tall, "µs", 450, 260, 210, 5 * _FFN_MATRIX),
        Row("SwiGLU backward to E4M3 1×128, row + column", tall, "µs", 582, 290, 210, 5 * _FFN_MATRIX),
        Row("RoPE on q and k", f"{TOKENS}×{2 * HIDDEN} bf16", "µs", 78, 69, 62, 4 * _MATRIX),
        Row("RoPE backward to E5M2, row + column", f"{TOKENS}×{3 * HIDDEN} bf16", "µs", 240, 120, 94, 6 * _MATRIX),
        Row("cross-entropy forward + backward", f"{TOKENS}×{VOCABULARY} bf16", "µs", 610, 430, 366,
            3 * 2 * TOKENS * VOCABULARY),
        Row("AdamW", f"{PARAMETERS / 1e9:.2f}e9", "ms", 63, 52, 47, ADAMW_BYTES * PARAMETERS),
        Row("gradient norm", f"{PARAMETERS / 1e9:.2f}e9", "ms", 8.5, 7, 6.3, 4 * PARAMETERS),
    ]  # fmt: skip
    table += list(_matmuls())
    return table


def _matmuls() -> Iterator[Row]:
    kinds = [
        ("tensorwise", (1100, 1250, 1400)),
        ("blockwise", (950, 1100, 1250)),
        ("blockwise, custom kernel", (950, 1100, 1250)),
        ("blockwise, weight gradient", (750, 900, 1000)),
        ("blockwise, weight gradient, custom kernel", (750, 900, 1000)),
    ]
    for name, targets in kinds:
        for width in (3 * HIDDEN, 2 * FFN):
            shape = f"{TOKENS}×{width}×{HIDDEN}"
            yield Row(f"FP8 GEMM {name}", shape, "TFLOP/s", *targets, 2 * TOKENS * width * HIDDEN)


def key(row: Row) -> str:
    """Return a row's name in a file of results."""
    return f"{row.name} {row.shape}" if "GEMM" in row.name else row.name


def cells(row: Row, result: dict[str, Any] | None) -> list[str]:
    """Format a row of the table, in the order of HEADER."""
    line = [row.name, row.shape, *(_number(x, row.unit) for x in (row.floor, row.target)), ""]
    line[4] = f"{_number(row.bound, row.unit)} {row.unit}"
    if result is None:
        return [*line, "not yet run on a GPU", "", "", ""]
    if "error" in result:
        return [*line, f"failed: {result['error']}", "", "", ""]
    seconds = result["seconds"]
    if result["share"] < 1:
        line[1] += f" (measured on {result['share']:.0%})"
    teraflops = row.work / seconds / 1e12
    value = teraflops if row.unit == "TFLOP/s" else _in_unit(seconds, row.unit)
    rate = f"{seconds * 1e6:,.0f} µs" if row.unit == "TFLOP/s" else f"{row.work / seconds / 1e9:,.0f} GB/s"
    copy = f"{_number(_in_unit(result['copy'], row.unit), row.unit)}" if "copy" in result else ""
    return [*line, f"**{_number(value, row.unit)}**", rate, copy, _best(result)]


def _best(result: dict[str, Any]) -> str:
    """Format the fastest alternative, and its time relative to ours."""
    ran = {name: time for name, time in result["others"].items() if not isinstance(time, str)}
    if not ran:
        return "none ran"
    name = min(ran, key=lambda name: ran[name])
    return f"{name}, {ran[name] / result['seconds']:.2f}×"


def _in_unit(seconds: float, unit: str) -> float:
    return seconds * {"µs": 1e6, "ms": 1e3}[unit]


def _number(value: float, unit: str) -> str:
    return f"{value:,.0f}" if unit == "TFLOP/s" or value >= 1000 else f"{value:.1f}".removesuffix(".0")


def table(results: dict[str, Any], *, markdown: bool) -> str:
    """Format all rows, with the available results."""
    lines = [list(HEADER), *(cells(row, results.get(key(row))) for row in rows())]
    if markdown:
        lines.insert(1, ["---"] * len(HEADER))
        return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines).replace("**", "  ")


def section(documents: Sequence[dict[str, Any]]) -> str:
    """Render the text between the markers of a document."""
    results = {name: result for document in documents for name, result in document["rows"].items()}
    machines = [document["machine"] for document in documents]
    said = "Not yet run on a GPU; `bash tools/bench/gpu.sh` fills in the table."
    if machines:
        names = sorted({f"{m['gpu']}, torch {m['torch']}, {m['commit']}" for m in machines})
        said = f"`bash tools/bench/gpu.sh` ({'; '.join(names)})."
    for found in (m for m in machines if "copy_tb_s" in m):
        said += f" Here a device copy of 8 GB moves {found['copy_tb_s']:.2f} TB/s, a bf16 matmul of 8192³ runs at "
        said += f"{found['bf16_tflops']:.0f} TFLOP/s."
    return f"{said}\n\n{table(results, markdown=True)}"


def write_between_markers(path: Path, text: str, begin_line: str = BEGIN, end_line: str = END) -> None:
    """Replace the text between the two marker lines of a document.

    Raises:
        ConfigError: the document does not have both markers, once each and in order.
    """
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = content.partition(begin_line)
    _, end, after = rest.partition(end_line)
    if not begin or not end or begin_line in rest or end_line in before + after:
        wanted = f"one line {begin_line} and, after it, one line {end_line}"
        raise ConfigError(f"--into {path}: expected a document with {wanted}")
    path.write_text(f"{before}{begin_line}\n{text}\n{end_line}{after}", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read results written by kernels.py."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"--results {path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"--results {path}: expected a file that --json wrote: {error}") from None
    if not {"machine", "rows"} <= document.keys():
        raise ConfigError(f"--results {path}: expected a file that --json wrote")
    return document


def source(commit: str | None) -> dict[str, Any]:
    """Describe the environment of the results."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit or git_commit()}


def git_commit() -> str:
    """Describe the checked-out commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"

"""Clocks and power of the GPU while something runs: nvidia-smi beside it, ten times a second."""

import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FIELDS = {"clocks.sm": "sm_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
INTERVAL_MS = 100


@contextmanager
def sampled(device: str) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that afterwards has [lowest, median, highest] of each of `FIELDS`; empty on a CPU."""
    found: dict[str, Any] = {}
    if device != "cuda":
        yield found
        return
    query = [f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_MS}"]
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(["nvidia-smi", gpu, *query], stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            found["error"] = str(error)
            yield found
            return
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            output.seek(0)
            found |= summarize(output.read())


def summarize(text: str) -> dict[str, Any]:
    """Summarize lines of nvidia-smi; lines that are not all numbers are left out (the last may be cut)."""
    rows = [row for row in map(_numbers, text.splitlines()) if row]
    if not rows:
        return {"error": f"nvidia-smi printed no samples: {text.strip()[:200]}"}
    columns = dict(zip(FIELDS.values(), zip(*rows, strict=True), strict=True))
    summary: dict[str, Any] = {name: [min(x), statistics.median(x), max(x)] for name, x in columns.items()}
    return summary | {"samples": len(rows)}


def _numbers(line: str) -> list[float]:
    try:
        numbers = [float(cell) for cell in line.split(",")]
    except ValueError:
        return []
    return numbers if len(numbers) == len(FIELDS) else []

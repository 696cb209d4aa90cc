"""Profile of a training step: which kernels it launches, how long they take, and how long the device is idle.

`measure` runs a step under PyTorch's profiler and summarizes its trace, in the Chrome format; `parts` adds kernels up
by what they do. On a CPU operators, without those that they call, take the place of kernels.
"""

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
LATE_US = 10.0  # a gap that long means that the host is late; launches leave 2-4 µs
PARTS = {  # the first pattern that a kernel's name contains
    "attention, backward": r"sdpa.*bprop|flash.*(bwd|backward)|fmha.*backward|dot_do_o|convert_dq",
    "attention, forward": r"sdpa.*fprop|flash.*(fwd|forward)|fmha|flash_attention",
    "matmuls, weight gradient": r"_badd_|fp8_matmul.*true",
    "matmuls, forward and input gradient": r"nvjet|gemm|cutlass|cublas|fp8_matmul|aten::(mm|addmm)|_linear",
    "transpose FP8": r"transpose_fp8|float8_copy",
    "quantize": r"quantize(?!_args)",  # no kernel of another part that quantizes its output
    "abs() and max()": r"AbsFunctor|MaxNanFunctor|amax",
    "norm backward": r"norm_backward",
    "norm forward": r"norm_forward",
    "SwiGLU backward": r"swiglu_backward",
    "SwiGLU forward": r"swiglu_forward",
    "RoPE": r"::rope|rope_",
    "cross-entropy": r"cross_entropy",
    "AdamW": r"adamw|adam",
    "gradient norm": r"square_sums|add_up|norm_kernel",
    "embedding": r"sum_and_scatter|compute_grad_weight|gather|radix_sort|embedding|index_",
    "additions": r"CUDAFunctor_add|aten::add",
    "zeros and fills": r"FillFunctor|Memset|aten::(zero_|fill_)",
    "copies and conversions": r"copy|Memcpy",
    "other": "",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill that ran on a stream of the device, or an operator on a thread; times in µs."""

    name: str
    start: float
    duration: float
    stream: int

    @property
    def end(self) -> float:
        return self.start + self.duration


def measure(step: Callable[[], Any], device: str, tokens: int) -> dict[str, Any]:
    """Run a step under the profiler and summarize it."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[activity]) as profiler:
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            wall_us = (time.perf_counter() - started) * 1e6
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return {"tokens": tokens, **summarize(kernels_of(trace, device), wall_us)}


def kernels_of(trace: Mapping[str, Any], device: str = "cuda") -> list[Kernel]:
    """Return what ran on the device, by start; on a CPU operators, without the time of those that they call."""
    categories = ON_DEVICE if device == "cuda" else ("cpu_op",)
    events = [event for event in trace["traceEvents"] if event.get("cat") in categories and event.get("ph") == "X"]
    kernels = sorted(
        (Kernel(x["name"], x["ts"], x["dur"], x.get("args", {}).get("stream", x["tid"])) for x in events),
        key=lambda kernel: (kernel.start, -kernel.duration),
    )
    return kernels if device == "cuda" else _without_what_they_call(kernels)


def _without_what_they_call(operators: list[Kernel]) -> list[Kernel]:
    """Subtract from each operator, sorted by start, those that it calls."""
    own, stacks = [operator.duration for operator in operators], defaultdict[int, list[int]](list)
    for number, operator in enumerate(operators):
        stack = stacks[operator.stream]
        while stack and operators[stack[-1]].end <= operator.start:
            stack.pop()
        if stack:
            own[stack[-1]] -= operator.duration
        stack.append(number)
    return [replace(operator, duration=max(0.0, us)) for operator, us in zip(operators, own, strict=True)]


def summarize(kernels: list[Kernel], wall_us: float) -> dict[str, Any]:
    """Add up kernels by name, {name: [µs, launches]}, with the share of `wall_us` in which any ran, and the gaps."""
    totals: dict[str, list[float]] = {}
    busy_us, end, gaps = 0.0, None, []
    for kernel in kernels:
        total = totals.setdefault(kernel.name, [0.0, 0])
        total[0] += kernel.duration
        total[1] += 1
        if end is not None and kernel.start > end:
            gaps.append(kernel.start - end)
        busy_us += max(0.0, kernel.end - max(kernel.start, end or kernel.start))
        end = max(kernel.end, end or kernel.end)
    late = [gap for gap in gaps if gap > LATE_US]
    return {
        "wall_us": wall_us,
        "busy": busy_us / wall_us,
        "launches": len(kernels),
        "gaps": {
            "count": len(gaps),
            "total_us": sum(gaps),
            "median_us": statistics.median(gaps) if gaps else 0.0,
            "late": len(late),
            "late_us": sum(late),
        },
        "kernels": {name: totals[name] for name in sorted(totals, key=lambda name: -totals[name][0])},
    }


def parts(kernels: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Add kernels up by what they do: {part: (ms, launches)}, in the order of `PARTS`."""
    totals = dict.fromkeys(PARTS, (0.0, 0))
    for name, (us, launches) in kernels.items():
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        totals[part] = totals[part][0] + us / 1000, totals[part][1] + launches
    return {part: total for part, total in totals.items() if total[1]}

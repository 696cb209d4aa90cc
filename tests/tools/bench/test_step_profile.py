"""Profiles of steps: traces of Kineto, and the parts of the profiles of the first run on a GPU."""

import json
import re
from pathlib import Path

import pytest
import torch

from tools.bench import step_profile
from tools.bench.results import load
from tools.bench.step_profile import Kernel, kernels_of, parts, summarize

ROOT = Path(__file__).parents[3]
FIRST_RUN = ROOT / "tools" / "bench" / "results" / "h200-6f2f60f"


def event(name: str, start: float, duration: float, cat: str = "kernel", tid: int = 7, **others) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": start, "dur": duration, **others}


def test_what_ran_on_the_device_is_read_from_a_trace():
    trace = {
        "traceEvents": [
            event("late", 30.0, 5.0, args={"stream": 7}),
            event("Memset (Device)", 12.0, 1.0, "gpu_memset", args={"stream": 7}),
            event("Memcpy HtoD", 0.0, 2.0, "gpu_memcpy", args={"stream": 20}),
            event("cudaLaunchKernel", 0.0, 9.0, "cuda_runtime"),
            event("aten::mm", 0.0, 9.0, "cpu_op"),
            {"ph": "M", "name": "process_name"},
            {"ph": "i", "cat": "kernel", "name": "mark", "ts": 1.0},
        ]
    }
    assert kernels_of(trace) == [
        Kernel("Memcpy HtoD", 0.0, 2.0, 20),
        Kernel("Memset (Device)", 12.0, 1.0, 7),
        Kernel("late", 30.0, 5.0, 7),
    ]


def test_operators_of_a_cpu_are_without_those_that_they_call():
    trace = {
        "traceEvents": [
            event("outer", 0.0, 10.0, "cpu_op"),
            event("inner", 1.0, 4.0, "cpu_op"),
            event("innermost", 2.0, 1.0, "cpu_op"),
            event("next", 6.0, 2.0, "cpu_op"),
            event("of another thread", 3.0, 8.0, "cpu_op", tid=8),
            event("a kernel", 3.0, 8.0),
        ]
    }
    own = {kernel.name: kernel.duration for kernel in kernels_of(trace, "cpu")}
    assert own == {"outer": 4.0, "inner": 3.0, "innermost": 1.0, "next": 2.0, "of another thread": 8.0}


def test_overlapping_streams_are_busy_once_and_gaps_are_where_none_runs():
    kernels = [Kernel("a", 0, 10, 1), Kernel("b", 5, 10, 2), Kernel("a", 18, 2, 1), Kernel("c", 50, 10, 1)]
    found = summarize(kernels, wall_us=100)
    assert found["busy"] == pytest.approx(0.27)
    assert found["kernels"] == {"a": [12, 2], "b": [10, 1], "c": [10, 1]}
    assert list(found["kernels"]) == ["a", "b", "c"]
    assert found["launches"] == 4
    assert found["gaps"] == {"count": 2, "total_us": 33, "median_us": 16.5, "late": 1, "late_us": 30}
    assert summarize([], 5.0)["busy"] == 0


def test_a_step_is_profiled_where_there_is_no_gpu():
    x = torch.randn(64, 64)
    found = step_profile.measure(lambda: (x @ x).relu_(), "cpu", tokens=64)
    assert found["tokens"] == 64
    assert found["kernels"]["aten::mm"][1] == 1
    assert 0 < found["busy"] <= 1
    assert json.loads(json.dumps(found)) == found


FIGURES = {  # ms in a step of 32,768 tokens, of docs/measurements.md's first run
    "bf16": {
        "matmuls, forward and input gradient": 1263,
        "matmuls, weight gradient": 681,
        "attention, forward": 81,
        "attention, backward": 242,
        "norm backward": 39,
    },
    "tensorwise": {"transpose FP8": 141, "abs() and max()": 144, "quantize": 93, "norm backward": 38},
    "delayed": {"transpose FP8": 140, "abs() and max()": 12, "quantize": 78},
    "blockwise": {"quantize": 155, "attention, backward": 205},
}
LAUNCHES = {"bf16": 12_562, "tensorwise": 37_539, "delayed": 19_367, "blockwise": 20_643}


@pytest.mark.parametrize("precision", FIGURES)
def test_the_profiles_of_the_first_run_have_their_parts(precision):
    profile = load(FIRST_RUN / f"step-{precision}.json")["rows"][f"llama2-7b {precision}, whole step, profile"]
    found = parts(profile["kernels"])
    for part, ms in FIGURES[precision].items():
        assert round(found[part][0]) == ms, part
    assert sum(launches for _, launches in found.values()) == profile["launches"] == LAUNCHES[precision]
    assert sum(ms for ms, _ in found.values()) == pytest.approx(sum(us for us, _ in profile["kernels"].values()) / 1000)


OF_CSRC = {
    "adamw": "AdamW",
    "add_up": "gradient norm",
    "amax": "abs() and max()",
    "cross_entropy_gradient": "cross-entropy",
    "cross_entropy_statistics": "cross-entropy",
    "embedding_backward": "embedding",
    "fp8_matmul": "matmuls, forward and input gradient",
    "norm_backward": "norm backward",
    "norm_backward_finish": "norm backward",
    "norm_backward_input_general": "norm backward",
    "norm_backward_weight_general": "norm backward",
    "norm_forward": "norm forward",
    "norm_forward_general": "norm forward",
    "quantize": "quantize",
    "rope": "RoPE",
    "rope_fp8": "RoPE",
    "square_sums": "gradient norm",
    "swiglu_backward": "SwiGLU backward",
    "swiglu_backward_fp8": "SwiGLU backward",
    "swiglu_forward": "SwiGLU forward",
    "swiglu_forward_fp8": "SwiGLU forward",
    "transpose_fp8": "transpose FP8",
}


def test_every_kernel_of_csrc_has_a_part():
    """Names as in a trace: with the types of the parameters, of which several kernels have `triaxis_quantize_args`."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").glob("*/*.cu")))
    kernels = re.findall(
        r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(([^{]*)\)\s*{", sources
    )
    assert {name for name, _ in kernels} == OF_CSRC.keys()
    for name, parameters in kernels:
        types = ", ".join(parameter.rsplit(maxsplit=1)[0] for parameter in parameters.split(","))
        traced = f"void triaxis::(anonymous namespace)::{name}<__nv_bfloat16, 8>({types})"
        assert list(parts({traced: (1000.0, 2)})) == [OF_CSRC[name]], traced


def test_kernels_of_pytorch_since_then_have_parts():
    names = {
        "pytorch_flash::flash_fwd_kernel<>": "attention, forward",
        "pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>": "attention, backward",
        "an_unknown_kernel": "other",
    }
    for name, part in names.items():
        assert list(parts({name: (1000.0, 2)}).items()) == [(part, (1.0, 2))]

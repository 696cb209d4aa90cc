"""Compare the implementations of causal attention of `ops.attention`, forward and backward, at the sizes of a 7B.

    python tools/bench/attention.py --json attention.json
    python tools/bench/attention.py --device cpu --tokens 64 --heads 2

Cases: a sequence of 4,096 tokens, two of them, and one of documents of 1,000 tokens on average. Every implementation
that can run here is compared with the reference on two heads, results and gradients, then timed: medians of 20 calls.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from engine.config.schema import AttentionImpl, OpsConfig
from engine.errors import ConfigError, run_program
from engine.ops.attention import attention, attention_reference
from engine.ops.choice import require_implementations

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.kernel_cases import require_close
from tools.bench.kernel_table import source
from tools.bench.results import Results

CALLS, HEAD_DIM, CHECKED_HEADS, TOLERANCE = 20, 128, 2, 2e-2
DOCUMENT = 1000 / 4096  # of the tokens, on average
Cuts = tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see the module's docstring."""
    options = _arguments(arguments)
    results = Results(options.json, source(options.commit))
    impls = [impl for impl in get_args(AttentionImpl) if impl != "auto"]
    for case, cuts in cases(options.tokens):
        for impl in impls:
            result = measure(impl, cuts, options.heads, options.device)
            results.add(f"attention {impl}, {case}", result)
            print(f"{case}, {impl}: {result.get('error') or result.get('skipped') or _line(result)}", flush=True)
    return 1 if any("error" in row for row in results.rows.values()) else 0


def _line(result: dict[str, Any]) -> str:
    return ", ".join(
        f"{way} {result[f'{way}_s'] * 1e6:,.0f} µs ({result[f'{way}_tflops']:,.0f} TFLOP/s)"
        for way in ("forward", "backward")
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence (default: 4096)")
    parser.add_argument("--heads", type=int, default=32, help="(default: 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; use --device cpu with few --tokens")
    return options


def cases(tokens: int) -> Iterator[tuple[str, Cuts]]:
    """Yield the cases: name and `cu_seqlens`."""
    yield f"1 × {tokens:,}", (0, tokens)
    yield f"2 × {tokens:,}", (0, tokens, 2 * tokens)
    mean = max(2, round(DOCUMENT * tokens))
    starts = np.cumsum(1 + np.random.default_rng(0).exponential(mean, 40).astype(int))
    yield f"documents of {mean:,}", (0, *(int(start) for start in starts if start < tokens), tokens)


def measure(impl: AttentionImpl, cuts: Cuts, heads: int, device: str) -> dict[str, Any]:
    """Check and time an implementation: seconds and TFLOP/s (half of the pairs, as causal) each way, or why not."""
    try:
        require_implementations(OpsConfig(attention=impl), torch.device(device))
    except ConfigError as error:
        return {"skipped": str(error)}
    torch.manual_seed(0)
    shape = (cuts[-1], heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))  # [t, n, d]
    grad = torch.randn(shape, device=device).bfloat16()
    try:
        out = attention(q, k, v, cuts, impl=impl)
        gradients = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        _check((out, *gradients), (q, k, v), grad, cuts)
        with torch.no_grad():
            forward = timed(lambda: attention(q, k, v, cuts, impl=impl), device)
        backward = timed(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device)
    except Exception as error:  # of another package, or out of memory: reported in its row
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    flops = 2 * sum((b - a) ** 2 for a, b in pairwise(cuts)) * heads * HEAD_DIM  # two matmuls, half of the pairs
    return {
        "value": (forward + backward) * 1e3,
        "unit": "ms",
        "forward_s": forward,
        "backward_s": backward,
        "forward_tflops": flops / forward / 1e12,
        "backward_tflops": 2.5 * flops / backward / 1e12,
    }


def _check(got: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grad: Tensor, cuts: Cuts) -> None:
    q, k, v = (x.detach()[:, :CHECKED_HEADS].float().requires_grad_() for x in inputs)
    expected = attention_reference(q, k, v, cuts)
    gradients = torch.autograd.grad(expected, (q, k, v), grad[:, :CHECKED_HEADS].float())
    require_close([x[:, :CHECKED_HEADS] for x in got], [expected, *gradients], TOLERANCE)


def timed(call: Callable[[], Any], device: str) -> float:
    """Return the median seconds of a call; on a GPU, calls are queued, so that the host is not measured."""
    if device == "cpu":
        return statistics.median(_seconds(call) for _ in range(3))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    call()
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(marks))


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_program(main)

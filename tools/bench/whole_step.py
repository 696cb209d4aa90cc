"""Measure a whole training step of a preset: tokens/s, MFU, peak memory, clocks and watts, and profile its kernels.

    python tools/bench/whole_step.py --preset llama2-7b --json step.json
    python tools/bench/whole_step.py --precision fp8 --optimizer.moments bf16 --precision.recipe delayed --profile
    python tools/bench/whole_step.py --documents 1000                   # documents masked, of 1,000 tokens on average
    python tools/bench/whole_step.py --impl transformers-liger          # the same sizes in Hugging Face Transformers
    python tools/bench/whole_step.py --device cpu --preset tiny --batch 2 --seq-length 64

Settings of a run (`--section.key VALUE`) can follow. Ours is the step of `engine train`, with gradient norm and
clipping. Theirs is `LlamaForCausalLM` in pure bf16, weights, gradients and AdamW's moments, in as many microbatches:
eager with PyTorch's attention, compiled, or with Liger kernels. Each is measured in a process of its own, as the memory
of a GPU does not hold two; tools/bench/gpu/ runs them one behind the other.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.config.load import resolve
from engine.config.schema import Config
from engine.data.samples.batch import Batch, collate
from engine.data.samples.sample import Sample
from engine.errors import ConfigError, run_program
from engine.model.families import PRESETS
from engine.model.parameters import parameter_table
from engine.ops.choice import require_fp8
from engine.ops.fp8_algorithms import Fp8Plans
from engine.parallel.layout import Layout, init_distributed
from engine.plan.layouts import require_fit
from engine.plan.memory import GIB, ClusterSpec, available
from engine.plan.throughput import FLOPS_FORMULA, flops_per_token, peak_tflops
from engine.train.step import build_model, train_step

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import power, step_profile
from tools.bench.kernel_table import source
from tools.bench.results import Results
from tools.bench.step import OPTIMIZER, torch_adamw

WARM_UP = 2  # steps: the first selects algorithms; with delayed scales, the second is the first to use them
PROFILED_TOKENS = 32_768  # of a step, so that profiles compare: the first microbatches, and the update
THEIRS = ("transformers", "transformers-compiled", "transformers-liger")
Step = Callable[[Sequence[Batch]], float]
"""Train on microbatches and return the loss."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see the module's docstring."""
    options = _arguments(arguments)
    config = configure(options)
    batches = random_microbatches(config, options.documents)
    results = Results(options.json, source(options.commit))
    step = _ours(config, options.device) if options.impl == "triaxis" else _theirs(config, options.impl, options.device)
    result = measure(step, batches, config, options)
    if options.documents is not None:
        result["mfu"] = None  # the FLOPs of attention are fewer than the formula's
    result |= {"settings": " ".join(options.settings), "impl": options.impl, "documents": options.documents}
    results.add(options.name, result)
    print(f"\n{options.name}: {result['value']:,.0f} tokens/s ({result['range'][0]:,.0f} – {result['range'][1]:,.0f})")
    mfu = "n/a" if result["mfu"] is None else f"{result['mfu']:.1%} of the dense bf16 peak"
    peak = "n/a" if result["peak_gib"] is None else f"{result['peak_gib']:.1f} GiB"
    power = f"; {result['power']}" if result["power"] else ""
    print(f"MFU {mfu}, by {FLOPS_FORMULA}; peak memory {peak}{power}", flush=True)
    if options.profile:
        profiled_batches = batches[: max(1, PROFILED_TOKENS // batches[0].tokens.numel())]
        profiled = profile(step, profiled_batches, options.device)
        results.add(f"{options.name}, profile", profiled | {"settings": result["settings"]})
        for part, (ms, launches) in step_profile.parts(profiled["kernels"]).items():
            print(f"  {part:40}{ms:9.1f} ms {launches:7,} launches")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="llama2-7b", help="a preset of engine/model/families.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--impl", choices=("triaxis", *THEIRS), default="triaxis")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--documents", type=int, metavar="TOKENS", help="mask documents of so many tokens on average")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (default: 16)")
    parser.add_argument("--seq-length", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument("--profile", action="store_true", help=f"then profile a step of {PROFILED_TOKENS:,} tokens")
    parser.add_argument("--name", help="of the result's row (default: the preset and the precision, or implementation)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    options, settings = parser.parse_known_args(arguments)
    options.settings = settings
    for flag in ("batch", "seq_length", "rounds", "documents"):
        if (value := getattr(options, flag)) is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: expected 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; use --device cpu with --preset tiny")
    if options.impl in THEIRS and (options.documents or options.precision == "fp8"):
        raise ConfigError(f"--impl {options.impl} trains in bf16, on whole sequences: no --precision, no --documents")
    if options.name is None:
        kind = options.precision if options.impl == "triaxis" else options.impl
        options.name = f"{options.preset} {kind}, whole step"
    return options


def configure(options: argparse.Namespace) -> Config:
    """Configure a run of the preset on one rank and random tokens, in microbatches of one sequence unless set."""
    raw: dict[str, Any] = {
        "model": {"preset": options.preset},
        "precision": {"mode": options.precision},
        "data": {
            "tokenizer": "byte",
            "train": [{"path": "unused"}],
            "seq_length": options.seq_length,
            "document_mask": options.documents is not None,
        },
        "batch": {"micro": 1, "global": options.batch},
        "train": {"steps": 1},
    }
    return resolve(raw, options.settings, presets=PRESETS, source="the benchmark")


def random_microbatches(config: Config, documents: int | None) -> list[Batch]:
    """A step's microbatches of random tokens, in documents of exponentially distributed lengths, if any."""
    length, micro = config.data.seq_length, config.batch.micro
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocab_size, (config.batch.global_, length + 1))
    samples = [Sample.following(row, _boundaries(random, length, documents)) for row in tokens]
    return [
        collate(samples[i : i + micro], tuple(range(i, i + micro)), document_mask=documents is not None)
        for i in range(0, len(samples), micro)
    ]


def _boundaries(random: np.random.Generator, length: int, mean: int | None) -> Any:
    if mean is None:
        return np.empty(0, dtype=np.int64)
    starts = np.cumsum(1 + random.exponential(mean, 2 + 8 * length // mean).astype(np.int64))
    return starts[starts < length]


def measure(step: Step, batches: Sequence[Batch], config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Time steps: tokens/s (median, slowest, fastest), MFU by causal FLOPs, GiB, the time on the host, and power."""
    on_gpu = options.device == "cuda"
    seconds: list[float] = []
    with power.sampled(options.device) as sampled:
        for number in range(1, WARM_UP + options.rounds + 1):
            started = time.perf_counter()
            loss = step(batches)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            if number == 1 and on_gpu and config.ops.measure:  # as the warm-up of a run does
                plans = Fp8Plans()
                for plan in plans.existing():
                    plans.use(plan, plans.measure(plan))
            print(f"step {number}: {seconds[-1]:.3f} s, loss {loss:.4f}", flush=True)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return summary(config, seconds[WARM_UP:], peak, peak_tflops(torch.device(options.device))) | {"power": sampled}


def summary(config: Config, seconds: list[float], peak_bytes: int | None, peak: float | None) -> dict[str, Any]:
    """Summarize the seconds of timed steps, the memory and the device's peak TFLOP/s."""
    tokens = config.batch.global_ * config.data.seq_length
    speed = tokens / statistics.median(seconds)
    flops = flops_per_token(config.model, parameter_table(config.model), config.data.seq_length)
    return {
        "value": speed,
        "unit": "tokens/s",
        "range": [tokens / max(seconds), tokens / min(seconds)],
        "step_s": statistics.median(seconds),
        "tokens": tokens,
        "mfu": None if peak is None else speed * flops / (peak * 1e12),
        "peak_gib": None if peak_bytes is None else peak_bytes / GIB,
    }


def profile(step: Step, batches: Sequence[Batch], device: str) -> dict[str, Any]:
    """Profile a step on some of its microbatches, after one that is not profiled."""
    step(batches)
    tokens = sum(batch.tokens.numel() for batch in batches)
    return step_profile.measure(lambda: step(batches), device, tokens)


def _ours(config: Config, device: str) -> Step:
    world = init_distributed(device)
    require_fp8(config.precision, config.ops, world.device)
    if device == "cuda":
        require_fit(config, Layout(), ClusterSpec(1, 1, available(world.device, 1), "cuda", torch.bfloat16))
    model, optimizer = build_model(config, world, torch.bfloat16, seed=0)
    numbers = count(1)

    def step(batches: Sequence[Batch]) -> float:
        tokens = sum(batch.tokens.numel() for batch in batches)
        result = train_step(model, optimizer, batches, step=next(numbers), lr=OPTIMIZER.lr, tokens=tokens)
        return result.loss.item()

    return step


def _theirs(config: Config, impl: str, device: str) -> Step:
    llama = _llama(config, impl, device)
    optimizer = torch_adamw(llama)
    run = torch.compile(llama, dynamic=False) if impl == "transformers-compiled" else llama

    def step(batches: Sequence[Batch]) -> float:
        total = torch.zeros((), device=device)
        for batch in batches:
            tokens, labels = batch.tokens.to(device), batch.labels.to(device)
            loss = run(input_ids=tokens, labels=labels, shift_labels=labels).loss / len(batches)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def _llama(config: Config, impl: str, device: str) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        if impl == "transformers-liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
    except ImportError as error:
        raise ConfigError(f"--impl {impl} needs transformers, and liger-kernel for Liger: {error}") from None
    settings = hf_config(config.model, dtype=torch.bfloat16, bos_id=None, eos_id=None)
    if settings["architectures"] != ["LlamaForCausalLM"]:
        raise ConfigError(f"--preset with --impl {impl}: expected a Llama, not {settings['architectures'][0]}")
    theirs: Any = LlamaConfig.from_dict(settings)
    theirs.use_cache = False
    with torch.device(device):
        llama: Any = LlamaForCausalLM._from_config(theirs, attn_implementation="sdpa", dtype=torch.bfloat16)
    return llama.train()


if __name__ == "__main__":
    run_program(main)

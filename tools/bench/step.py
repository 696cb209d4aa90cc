"""Compare our training step with that of Hugging Face Transformers: same shapes, weights and tokens, in one process.

Both run eagerly in fp32 on the CPU, with alternating steps, so that other load on the machine affects both equally;
compare the ratios. Ours is the step of `engine train`, including gradient norm and clipping; theirs is
`LlamaForCausalLM`, `loss.backward()` and `torch.optim.AdamW(fused=True)`. Ours is also measured without a choice of the
library for each kind of matmul (`ops.measure: false`), if that differs. The table is followed by a profile of our step
and the time of its matmuls alone, a lower bound for any implementation on the same library.

    python tools/bench/step.py --vocab-size 32000 2048 --threads 1 2 --rounds 9
    python tools/bench/step.py --threads 1 --clock cpu      # on a machine with much other load

whole_step.py measures a whole step of a preset on a GPU.
"""

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from engine.checkpoint.huggingface.config import hf_config
from engine.config.load import resolve
from engine.config.schema import ModelConfig, OptimizerConfig
from engine.data.samples.batch import Batch, collate
from engine.data.samples.sample import Sample
from engine.errors import ConfigError, TriaxisError, run_program
from engine.model.families import PRESETS
from engine.model.parameters import parameter_table
from engine.ops.linear import MATMUL_KINDS, grad_weight, matmul_transposed, measure_onednn
from engine.ops.measured import processor_name
from engine.parallel.layout import init_distributed
from engine.train.step import build_model, train_step

OPTIMIZER = OptimizerConfig()
HIDDEN_SIZE = 256  # without a preset
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], float]
"""Run one training step and return its loss."""


def main() -> None:
    """Run the program; see `--help`."""
    args = _arguments()
    print(f"{processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {_versions()}")
    for vocab_size in args.vocab_size:
        model = _model(args, vocab_size)
        torch.manual_seed(0)
        tokens = torch.randint(0, model.vocab_size, (args.batch, args.seq_length + 1))
        for threads in args.threads:
            torch.set_num_threads(threads)
            _compare(model, tokens, threads, args.rounds, CLOCKS[args.clock])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32000, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="steps of each implementation (default: 9)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the time that all threads have computed")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default: 4)")
    parser.add_argument("--seq-length", type=int, default=512, help="(default: 512)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--preset", help="a preset of engine/model/families.py, instead of 6 layers, hidden 256")
    args = parser.parse_args()
    numbers = {"--vocab-size": min(args.vocab_size), "--threads": min(args.threads), "--rounds": args.rounds}
    numbers |= {"--batch": args.batch, "--seq-length": args.seq_length, "--heads": args.heads}
    for flag, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{flag} {value}: expected 1 or more")
    if HIDDEN_SIZE % (2 * args.heads):
        raise ConfigError(f"--heads {args.heads}: hidden size {HIDDEN_SIZE} needs 1, 2, 4, ... or {HIDDEN_SIZE // 2}")
    return args


def _model(args: argparse.Namespace, vocab_size: int) -> ModelConfig:
    if args.preset is None:
        shape = {"num_layers": 6, "hidden_size": HIDDEN_SIZE, "intermediate_size": 688, "max_position": args.seq_length}
        heads = {"num_heads": args.heads, "num_kv_heads": args.heads, "head_dim": HIDDEN_SIZE // args.heads}
        return ModelConfig(vocab_size=vocab_size, **shape, **heads)
    llamas = [name for name, size in PRESETS.items() if size["family"] == "llama" and "rope_scaling" not in size]
    if args.preset not in llamas:
        raise ConfigError(f"--preset {args.preset}: expected a plain Llama, {', '.join(llamas)}")
    return ModelConfig(**PRESETS[args.preset] | {"vocab_size": vocab_size})


def _compare(model: ModelConfig, tokens: torch.Tensor, threads: int, rounds: int, clock: Clock) -> None:
    onednn = measure_onednn()
    ours, weights = _ours(model, tokens, onednn)
    sides = {"triaxis": ours}
    if onednn != MATMUL_KINDS:
        sides["triaxis, not measured"] = _ours(model, tokens, MATMUL_KINDS)[0]
    for attention in ("sdpa", "eager"):
        sides[f"transformers, {attention}"] = _transformers(model, tokens, weights, attention)
    losses = [step() for step in sides.values()]  # warmup, and check that all do the same work
    if max(losses) - min(losses) > 1e-3:
        raise TriaxisError(f"the implementations compute different losses for the same weights and tokens: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            seconds[name].append(_timed(step, clock))
    count = tokens[:, 1:].numel()
    print(f"\nvocabulary {model.vocab_size}, {threads} thread(s), {count} tokens a step, first loss {losses[0]:.4f}")
    print(f"  oneDNN for: {', '.join(sorted(onednn)) or 'no matmul'}")
    our_median = statistics.median(seconds["triaxis"])
    for name, times in seconds.items():
        median = statistics.median(times)
        speeds = f"{count / median:7,.0f} tokens/s ({count / max(times):,.0f} – {count / min(times):,.0f})"
        print(f"  {name:21} {speeds:36} triaxis is {median / our_median:.2f}×")
    _print_split(ours, model, count, onednn, clock)


def _timed(step: Callable[[], object], clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


def _ours(model: ModelConfig, tokens: torch.Tensor, onednn: frozenset[str]) -> tuple[Step, dict[str, torch.Tensor]]:
    """Return our step, and its initial weights by Hugging Face name."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    raw: dict[str, Any] = {
        "model": model.model_dump(),
        "data": {"tokenizer": "byte", "train": [{"path": "unused"}], "seq_length": length},
        "batch": {"micro": rows, "global": rows},
        "train": {"steps": 1},
    }
    config = resolve(raw, presets=PRESETS, source="the benchmark")
    decoder, optimizer = build_model(config, init_distributed("cpu"), torch.float32, seed=0, onednn=onednn)
    by_path = optimizer.parameters.by_path
    weights = {
        tensor.name: part.clone()
        for parameter in parameter_table(model).parameters
        for tensor, part in parameter.split(by_path[parameter.path].detach())
    }
    batch = _batch(tokens)

    def step() -> float:
        result = train_step(decoder, optimizer, [batch], step=1, lr=OPTIMIZER.lr, tokens=rows * length)
        return result.loss.item()

    return step, weights


def _batch(tokens: torch.Tensor) -> Batch:
    samples = [Sample.following(row, np.empty(0, dtype=np.int64)) for row in tokens.numpy()]
    return collate(samples, tuple(range(len(samples))), document_mask=False)


def torch_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with the settings of `OPTIMIZER`, for all parameters of `model`."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )


def _transformers(model: ModelConfig, tokens: torch.Tensor, weights: dict[str, torch.Tensor], attention: str) -> Step:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ConfigError("this comparison needs transformers: pip install 'triaxis[hf]'") from None
    config: Any = LlamaConfig.from_dict(hf_config(model, dtype=torch.float32, bos_id=None, eos_id=None))
    config.use_cache = False
    llama: Any = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    llama.load_state_dict(weights)
    llama.train()
    optimizer = torch_adamw(llama)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step() -> float:
        loss = llama(input_ids=inputs, labels=labels, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _print_split(step: Step, model: ModelConfig, tokens: int, onednn: frozenset[str], clock: Clock) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent: Counter[str] = Counter()
    for event in profiler.events() or []:
        spent[_part(event)] += event.self_cpu_time_total / 1000
    total = sum(spent.values())
    print(f"  one step of ours, profiled: {total:.0f} ms")
    for part, ms in spent.most_common():
        print(f"    {part:36} {ms:7.1f} ms {ms / total:5.0%}")
    print(f"    {'its matmuls alone':36} {_matmuls_ms(model, tokens, onednn, clock):7.1f} ms")


def _part(event: FunctionEvent) -> str:
    """Return the part of the step that an event's self time belongs to."""
    names = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    if "scaled_dot_product" in names[0]:
        return "attention"
    if names[0] in ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"):
        return "matmuls"
    if names[0] == "aten::_fused_adamw_":
        return "optimizer"
    if any("LinearCrossEntropy" in name for name in names):
        return "cross-entropy without its matmuls"
    return "norms, rotary, SwiGLU, the rest"


def _matmuls_ms(model: ModelConfig, tokens: int, onednn: frozenset[str], clock: Clock) -> float:
    """Measure the time of only the step's matmuls: three for each weight."""
    total = 0.0
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    hidden, ffn = model.hidden_size, model.intermediate_size
    layer = [(hidden, heads), (model.num_heads * model.head_dim, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    for (inputs, outputs), times in Counter(layer * model.num_layers + [(hidden, model.vocab_size)]).items():
        rows = min(tokens, 256) if outputs == model.vocab_size else tokens
        x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        for matmul in (
            partial(matmul_transposed, x, weight, onednn),
            partial(matmul_transposed, grad, weight.t(), onednn),
            partial(grad_weight, grad, x, onednn),
        ):
            total += min(_timed(matmul, clock) for _ in range(5)) * times * tokens / rows
    return total * 1000


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


if __name__ == "__main__":
    run_program(main)

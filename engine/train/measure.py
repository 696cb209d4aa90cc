"""Choices between implementations by measuring, the same on every rank.

One rank measures, or reads what was measured before, and the others take its choice. Choices are kept for the machine,
and in the run directory: a resumed run rounds as before, also where the machine's are gone. Without measuring
(`ops.measure: false`, `run.deterministic`) the choice does not depend on the machine.
"""

import struct
from functools import partial

import torch

from engine.config.schema import Config
from engine.formatting import counted
from engine.model.attention import scores_of
from engine.model.parameters import kv_share
from engine.ops import linear
from engine.ops.attention_choice import (
    IMPLS,
    AttentionImpls,
    AttentionProblem,
    attention_key,
    example_documents,
    measure_attention,
    parse_attention,
)
from engine.ops.fp8_algorithms import Fp8Plans
from engine.ops.measured import MeasuredChoices, default_directory, digest
from engine.parallel.agreement import compute_once, gather_ints
from engine.parallel.layout import World
from engine.train.inputs import Inputs
from engine.train.log import RunLog

_KINDS = {"plain": "sequences of one length", "documents": "documents", "windows": "sliding windows"}
_ALGORITHM = struct.Struct("<8q")  # as integers, which ranks exchange


def choose_onednn(config: Config, world: World, dtype: torch.dtype, log: RunLog) -> frozenset[str]:
    """Choose the kinds of fp32 matmuls on a CPU that oneDNN computes, for parameters of `dtype`. A collective."""
    if not _measures(config) or world.device.type != "cpu" or dtype != torch.float32 or not linear.has_onednn():
        return linear.MATMUL_KINDS
    kinds, choices = sorted(linear.MATMUL_KINDS), _choices(config, log)

    def choose(_: int) -> list[int]:
        chosen = choices.choose(linear.measured_key(), linear.measure_onednn, sorted, linear.parse_onednn)
        return [int(kind in chosen) for kind in kinds]

    (bits,) = compute_once(world, [1], choose, len(kinds))
    chosen = [kind for kind, bit in zip(kinds, bits, strict=True) if bit]
    default = "MKL" if torch.backends.mkl.is_available() else "BLAS"
    by_onednn = f"oneDNN for {', '.join(chosen)}; {default} for the rest" if chosen else f"{default} for all kinds"
    log.say(f"matmuls     fp32, as measured: {by_onednn} (kept in {choices.directories[-1]})")
    return frozenset(chosen)


def choose_fp8_algorithms(config: Config, world: World, log: RunLog, plans: Fp8Plans | None = None) -> bool:
    """Choose cuBLASLt's algorithm for each FP8 matmul that has run on this rank's device. A collective.

    Returns:
        whether any rank has such matmuls; the first use of their algorithms may wait for the device.
    """
    if not _measures(config) or config.precision.mode != "fp8":
        return False
    plans, choices = plans or Fp8Plans(), _choices(config, log)
    mine = [plan for plan in plans.existing() if plan.device == world.device.index]
    keys = [plans.measured_key(plan) for plan in mine]

    def choose(index: int) -> tuple[int, ...]:
        plan = mine[index]

        def parse(text: str) -> bytes:
            plans.use(plan, algorithm := bytes.fromhex(text))
            return algorithm

        return _ALGORITHM.unpack(choices.choose(keys[index], lambda: plans.measure(plan), bytes.hex, parse))

    chosen = [_ALGORITHM.pack(*numbers) for numbers in compute_once(world, [digest(key) for key in keys], choose, 8)]
    first = [plans.candidates(plan, 1)[0] for plan in mine]
    for plan, algorithm in zip(mine, chosen, strict=True):
        plans.use(plan, algorithm)
    if mine:
        changed = sum(a != b for a, b in zip(first, chosen, strict=True))
        log.say(
            f"fp8         {counted(len(mine), 'matmul')} by cuBLASLt {plans.version}, as measured: {changed} with "
            f"another algorithm than its heuristic's first (kept in {choices.directories[-1]})"
        )
    return max(gather_ints(world, len(mine))) > 0


def choose_attention(config: Config, world: World, inputs: Inputs, log: RunLog) -> AttentionImpls:
    """Choose the implementations of attention on a GPU, if `ops.attention` leaves them open. A collective."""
    if config.ops.attention != "auto" or not _measures(config) or world.device.type != "cuda":
        return AttentionImpls()
    datasets = inputs.train_data.datasets
    document_tokens = sum(data.num_tokens for data in datasets) / max(1, sum(data.num_documents for data in datasets))
    problems = attention_problems(config, world, inputs.dtype, document_tokens)
    choices, keys = _choices(config, log), [attention_key(problem) for problem in problems]

    def choose(index: int) -> list[int]:
        measure = partial(measure_attention, problems[index])
        return [IMPLS.index(choices.choose(keys[index], measure, str, parse_attention))]

    numbers = compute_once(world, [digest(key) for key in keys], choose, 1)
    found = {problem.kind: IMPLS[number] for problem, (number,) in zip(problems, numbers, strict=True)}
    for_each = ", ".join(f"{impl} for {_KINDS[kind]}" for kind, impl in found.items())
    log.say(f"attention   as measured: {for_each} (kept in {choices.directories[-1]})")
    return AttentionImpls(**found)


def attention_problems(
    config: Config, world: World, dtype: torch.dtype, document_tokens: float
) -> list[AttentionProblem]:
    """Return what attention is measured with, for this rank's heads: sequences without documents and with some, with
    each window that layers have.
    """
    model, length = config.model, config.data.seq_length
    tokens = config.batch.micro * length
    batches = [tuple(range(0, tokens + 1, length))]
    if config.data.document_mask:
        batches.append(example_documents(tokens, document_tokens))
    heads = (model.num_heads // world.tp.size, kv_share(model, world.tp)[1], model.head_dim)
    windows = sorted({model.window(layer) for layer in range(model.num_layers)}, key=lambda window: window or 0)
    found = [(window, batch) for window in windows for batch in batches]
    return [AttentionProblem(world.device, dtype, *heads, batch, window, scores_of(model)) for window, batch in found]


def _measures(config: Config) -> bool:
    return config.ops.measure and not torch.are_deterministic_algorithms_enabled()


def _choices(config: Config, log: RunLog) -> MeasuredChoices:
    machine = config.ops.measured_dir or default_directory()
    return MeasuredChoices([config.run.dir / "measured", *([machine] if machine else [])], log.say)

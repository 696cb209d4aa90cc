"""The warm-up computes what schedules compute, changes nothing, and has no message under way."""

import io
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import Config
from engine.data.samples.batch import Batch, collate
from engine.data.samples.sample import Sample
from engine.parallel.data import ShardedParameters
from engine.parallel.gradients import GradientFlow
from engine.parallel.layout import Layout
from engine.parallel.pipeline.executor import Pipeline
from engine.parallel.pipeline.program import Program
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import random_batches, read_records, run_config, write_conversations
from engine.train import warm_up
from engine.train.metrics import StepReporter
from engine.train.run import train
from engine.train.step import DistributedModel, build_model, train_step
from engine.train.trainer import Trainer
from tests.parallel.live_memory import LiveMemory, settled

S = 32
SMALL = 5000  # bytes: a few scales, and a thousand maxima (`AmaxSlots`)
FP8 = ("precision.mode fp8", "model.intermediate_size 192")
DELAYED = (*FP8, "precision.recipe delayed", "precision.amax_history 3")
CHATS = ("task sft", "train.neftune_alpha 5", "batch.micro 4", "batch.global 8")
INTERLEAVED = ("parallel.pp 2", "parallel.schedule interleaved", "parallel.virtual_stages 2")
ZERO_BUBBLE = ("parallel.pp 2", "parallel.schedule zero_bubble")


@dataclass(frozen=True)
class Case:
    """A run. `alike`: no operator chooses its path or its shapes by the data."""

    settings: tuple[str, ...]
    ranks: int = 1
    preset: str = "tiny"
    alike: bool = True


CASES = {
    "one rank": Case(("batch.micro 2", "train.z_loss 0.01")),
    "documents": Case(("batch.micro 2",), alike=False),
    "window": Case(("model.sliding_window 12", "parallel.recompute selective"), preset="tiny-starcoder2", alike=False),
    "recompute": Case(("parallel.recompute full", "precision.mode bf16"), preset="tiny-qwen3"),
    "tp": Case(("parallel.tp 2", "parallel.recompute selective"), 2, preset="tiny-qwen2"),
    "shared heads": Case(("parallel.tp 4", "precision.mode bf16"), 4),
    "dp": Case(("parallel.sharded_optimizer false",), 2),
    "interleaved": Case((*INTERLEAVED, "parallel.recompute full"), 2),
    "zero bubble, tied ends": Case(ZERO_BUBBLE, 2, preset="tiny-starcoder2"),
    "tp, pp": Case((*ZERO_BUBBLE, "parallel.tp 2"), 4, alike=False),
    "tensorwise": Case((*FP8, "parallel.recompute full")),
    "blockwise": Case((*FP8, "precision.recipe blockwise", "parallel.tp 2"), 2),
    "delayed": Case((*DELAYED, "parallel.tp 2"), 2),
    "delayed, zero bubble": Case((*DELAYED, *ZERO_BUBBLE), 2),
    "fine-tuning": Case(CHATS, alike=False),
    "fine-tuning, pp": Case((*CHATS, "data.packing false", "parallel.pp 2"), 2, alike=False),
}
Calls = set[tuple[str, bool, bool, Any]]
"""(operator, whether autograd follows, whether gradients of weights are postponed, types and shapes of its tensors)"""


@dataclass
class Seen:
    """What one rank saw: operators with the types and shapes of their tensors, communication with its group, what a
    warm-up changed, and the samples of its batches and of the first microbatch of the first step.
    """

    warm_up: Calls = field(default_factory=set)
    schedules: Calls = field(default_factory=set)
    messages: set[tuple[str, ...]] = field(default_factory=set)
    tp_group: str = ""
    changes: list[str] = field(default_factory=list)
    batches: list[tuple[int, ...]] = field(default_factory=list)
    first: tuple[int, ...] = ()


class Operators(TorchDispatchMode):
    def __init__(self, calls: Calls, messages: set[tuple[str, str]]) -> None:
        super().__init__()
        self.calls, self.messages = calls, messages
        self.flow: GradientFlow | None = None
        self.paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        if function.namespace == "c10d":
            self.messages.add((str(function), *filter(None, map(group_name, leaves))))
        elif not self.paused:
            tensors = [(leaf.dtype, tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            postpones = self.flow is not None and self.flow.postponed is not None
            self.calls.add((str(function), torch.is_grad_enabled(), postpones, tuple(tensors)))
        return function(*args, **(kwargs or {}))


def group_name(value: Any) -> str | None:
    try:
        return dist.ProcessGroup.unbox(value).group_name
    except (TypeError, RuntimeError):
        return None


def state(model: DistributedModel, parameters: ShardedParameters) -> dict[str, Any]:
    """All that a warm-up must leave alone."""
    fp8, found = model.fp8, {"random": torch.get_rng_state(), "peak": model.pipeline.peak_in_flight}
    for number, bucket in enumerate(parameters.buckets):
        found |= {f"parameters {number}": bucket.param.clone(), f"incomplete {number}": set(bucket.incomplete)}
        found[f"reducing {number}"] = bucket.reducing
    found["grads"] = [path for path, parameter in parameters.by_path.items() if parameter.grad is not None]
    if fp8 is not None:
        found |= {"amax": fp8._amax.clone(), "scales": fp8._scales.clone(), "history": fp8._history.clone()}
        found["sources"] = [quantizer.use_history for quantizer in fp8.quantizers.values()]
        found["cached"] = [path for path, quantizer in fp8.quantizers.items() if quantizer.weight_cache is not None]
    flow = parameters.flow
    return found | {"flow": (flow.is_last_pass, flow.postponed)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name, value in before.items() if not same(value, after[name])]


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Within, runs warm up, and what their ranks compute is noted; but for the sums of gradients over ranks."""
    real_warm_up, real_run = DistributedModel.warm_up, Pipeline.run
    real_init, real_reduce = Trainer.__init__, ShardedParameters._start_reducing
    trainers: list[Trainer] = []
    in_warm_up, in_schedule = Operators(seen.warm_up, seen.messages), Operators(seen.schedules, set())

    def warm(model: DistributedModel, batch: Any) -> None:
        parameters = trainers[0].optimizer.parameters
        if any(bucket.gathering for bucket in parameters.buckets):
            seen.changes.append("parameters are under way")
        before = state(model, parameters)
        for bucket in parameters.buckets:
            bucket.grad.zero_()
        in_warm_up.flow = in_schedule.flow = parameters.flow
        with in_warm_up:
            real_warm_up(model, batch)
        seen.changes += changed(before, state(model, parameters))
        if not any(bucket.grad.any() for bucket in parameters.buckets):
            seen.changes.append("no gradient")
        seen.batches.append(batch.sample_numbers)
        group = model.world.tp_group
        seen.tp_group = "" if group is None else group.group_name

    def run(pipeline: Pipeline, program: Program, microbatches: Any, *rest: Any) -> torch.Tensor:
        if program.schedule.trains:
            seen.first = seen.first or microbatches[0].sample_numbers
        with in_schedule:
            return real_run(pipeline, program, microbatches, *rest)

    def reduce(parameters: ShardedParameters, bucket: Any) -> None:
        in_schedule.paused = True
        real_reduce(parameters, bucket)
        in_schedule.paused = False

    with ExitStack() as stack:
        stack.enter_context(patch.object(warm_up, "first_use_waits", lambda device: True))
        stack.enter_context(patch.object(DistributedModel, "warm_up", warm))
        stack.enter_context(patch.object(Pipeline, "run", run))
        stack.enter_context(patch.object(ShardedParameters, "_start_reducing", reduce))
        stack.enter_context(
            patch.object(Trainer, "__init__", lambda self, *given: (trainers.append(self), real_init(self, *given))[1])
        )
        yield


def train_twice(plain: Config, warmed: Config, store: Path) -> Seen:
    """Train without a warm-up, then with one."""
    seen, ranks = Seen(), int(os.environ["WORLD_SIZE"])
    train(plain)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=ranks)
    with watched(seen):
        train(warmed)
    return seen


def config_of(case: Case, directory: Path, name: str, steps: int) -> Config:
    sft = "task sft" in case.settings
    data = [f"data.{part} [{{path: {directory}/chats}}]" for part in ("train", "valid")] if sft else []
    whole = ["data.document_mask false"] if case.alike else []
    settings = [*case.settings, *data, *whole, f"run.dir {directory / name}", "train.eval_steps 1"]
    words = [word for setting in settings for word in f"--{setting}".split(" ", 1)]
    return run_config(directory, *words, preset=case.preset, steps=steps)


def outcome(config: Config) -> dict[Any, Any]:
    """All numbers of a run, by step, and all tensors of its checkpoint."""
    found: dict[Any, Any] = {}
    for record in read_records(config.run.dir / "metrics.jsonl"):
        found |= {(record["step"], name): record[name] for name in ("loss", "grad_norm", "eval_loss") if name in record}
    checkpoint = open_checkpoint(config.run.dir)
    for kind in checkpoint.manifest.tensors:
        found |= {(kind, name): checkpoint.read(name, kind=kind) for name in checkpoint.tensors(kind)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_bitwise_the_same_with_a_warm_up_which_covers_it(workspace, name):
    case = CASES[name]
    write_conversations(workspace / "chats")
    plain, warmed = (config_of(case, workspace, directory, 2) for directory in ("plain", "warmed"))
    ranks = run_ranks(case.ranks, train_twice, plain, warmed, workspace / "store")
    expected, found = outcome(plain), outcome(warmed)
    assert len(expected) > 20
    assert changed(expected, found) == []
    for seen in ranks:
        assert seen.batches == [seen.first] * (1 if case.alike else 2)
        assert seen.changes == []
        assert {group for _, group in seen.messages} == ({seen.tp_group} if seen.tp_group else set())
        assert uncovered(seen, case.alike) == []


def uncovered(seen: Seen, alike: bool) -> list[str]:
    """The operators of the schedules that the warm-up has not used: with their shapes, but where the data decide how
    many documents and targets there are, with the dimensions of the kinds of tensors they are given.
    """

    def kinds(given: tuple[tuple[torch.dtype, tuple[int, ...]], ...]) -> tuple[Any, ...]:
        return given if alike else tuple(dict.fromkeys((dtype, len(shape)) for dtype, shape in given))

    assert len(seen.schedules) > 50
    used, warm = ({(*how, kinds(given)) for *how, given in calls} for calls in (seen.schedules, seen.warm_up))
    return sorted(map(str, used - warm))


def test_a_resumed_run_warms_up_with_the_history_that_it_has(workspace):
    case = Case((*DELAYED, "lr_schedule.kind constant"), 2)
    configs = [[config_of(case, workspace, name, steps) for name in ("plain", "warmed")] for steps in (2, 4)]
    run_ranks(2, train_twice, *configs[0], workspace / "store1")
    ranks = run_ranks(2, train_twice, *configs[1], workspace / "store2")
    expected, found = (outcome(config) for config in configs[1])
    assert max(step for step, _ in expected if isinstance(step, int)) == 4
    assert changed(expected, found) == []
    for rank, seen in enumerate(ranks):
        assert seen.changes == uncovered(seen, alike=True) == []
        assert seen.batches == [seen.first] == [(8 + 2 * rank,)]
    finished = run_ranks(
        2, train_twice, *configs[1], workspace / "store3"
    )  # and where there is nothing to do, does not
    assert [seen.batches for seen in finished] == [[], []]


def test_it_comes_first_and_only_where_a_first_use_waits(workspace, capfd):
    config, order = run_config(workspace, "--train.eval_steps", "1", steps=1), []
    with (
        patch.object(warm_up, "first_use_waits", lambda device: order.append("warm-up") or device.type == "cpu"),
        patch.object(StepReporter, "before_training", lambda *_: order.append("hooks")),  # restarts the clock
    ):
        train(config)
    assert order == ["warm-up", "hooks"]
    lines = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
    assert lines[lines.index("start") :][:3] == ["start", "warm-up", "evaluation"]
    assert [warm_up.first_use_waits(torch.device(kind)) for kind in ("cuda", "cpu")] == [True, False]


def moments(config: Config) -> tuple[float, float, str]:
    """When this rank has warmed up, for which the second takes its time; when its hooks begin; what it prints."""
    warmed, began, printed = [], [], io.StringIO()

    def warm(*_: Any) -> None:
        time.sleep(0.5 * int(os.environ["RANK"]))
        warmed.append(time.time())

    with (
        patch.object(warm_up, "first_use_waits", lambda device: True),
        patch.object(DistributedModel, "warm_up", warm),
        patch.object(StepReporter, "before_training", lambda *_: began.append(time.time())),
        redirect_stdout(printed),
    ):
        train(config)
    return max(warmed), began[0], printed.getvalue()


def test_nobody_begins_before_all_are_warm(workspace):
    ranks = run_ranks(2, moments, run_config(workspace, steps=1))
    assert max(warmed for warmed, _, _ in ranks) <= min(began for _, began, _ in ranks)
    (line,) = (line for line in ranks[0][2].splitlines() if line.startswith("warm-up"))
    assert float(line.split()[1]) >= 1  # the slowest rank's, with two paths


def test_random_states_are_put_back(tmp_path):
    """Compilers and other libraries may draw numbers; this part of the model does."""
    config = run_config(tmp_path)
    model, _ = build_model(config, world_of(), torch.float32, seed=1)
    (part,) = model.pipeline.parts
    model.pipeline.parts = [lambda *arguments: part(*arguments) + 0 * torch.rand(())]
    before = torch.get_rng_state()
    model.warm_up(random_batches(config)[0])
    assert torch.equal(torch.get_rng_state(), before)


def memory(config: Config, layout: Layout) -> tuple[int, int, int]:
    """Bytes at the peak of a warm-up, after it, and at the peak of a step."""
    world = world_of(layout)
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    model, optimizer = build_model(config, world, dtype, seed=1)
    batches = random_batches(config)
    with LiveMemory() as warm:
        model.warm_up(batches[0])
        left = settled(warm)
    optimizer.parameters.begin_step()
    with LiveMemory() as step:
        model.train(batches, 1.0)
    return warm.peak, left, step.peak


@pytest.mark.parametrize(
    ("settings", "layout"),
    [((), Layout()), (INTERLEAVED, Layout(pp=2)), (ZERO_BUBBLE, Layout(pp=2)), (DELAYED, Layout())],
    ids=["1f1b", "interleaved", "zero bubble", "delayed"],
)
def test_it_takes_no_more_memory_than_a_step(tmp_path, settings, layout):
    config = config_of(Case(settings), tmp_path, "run", 2)
    for warm, left, step in run_ranks(layout.world_size, memory, config, layout):
        assert 100_000 < warm <= step + SMALL
        assert left < SMALL


def compiled(config: Config) -> tuple[int, int]:
    """Graphs that the compiler has made in the warm-up, and in an evaluation and two steps behind it."""
    from torch._dynamo.utils import counters

    compile_quickly = torch.compile  # the compiler's front and its autograd, but no machine code, which takes long
    with patch.object(torch, "compile", lambda function: compile_quickly(function, backend="aot_eager")):
        model, optimizer = build_model(config, world_of(Layout(pp=2)), torch.float32, seed=1)
    batches = random_batches(config)
    model.warm_up(batches[0])
    graphs = counters["stats"]["unique_graphs"]
    model.evaluate(batches)
    for step in (1, 2):
        train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=128)
    return graphs, counters["stats"]["unique_graphs"] - graphs


def test_nothing_is_left_to_compile(tmp_path):
    settings = ("parallel.pp 2", "parallel.compile true", "parallel.recompute selective", "model.num_layers 2")
    for graphs, later in run_ranks(2, compiled, config_of(Case(settings), tmp_path, "run", 2)):
        assert graphs > 0
        assert later == 0


def batch_of(boundaries: list[list[int]], mask: list[bool] | None = None) -> Batch:
    tokens = np.zeros(S, np.int64)
    targets = None if mask is None else np.array(mask)
    samples = [Sample(tokens, tokens, np.array(starts, np.int64), targets) for starts in boundaries]
    return collate(samples, tuple(range(len(samples))), document_mask=True)


@pytest.mark.parametrize(
    ("boundaries", "several"), [([[], []], False), ([[S // 2], [S // 2]], False), ([[5], []], True), ([[], [31]], True)]
)
def test_documents_of_one_and_of_several_lengths(tmp_path, boundaries, several):
    batch, other = warm_up.paths(batch_of(boundaries), run_config(tmp_path))
    assert batch.cu_seqlens == batch_of(boundaries).cu_seqlens
    for each, expected in ((batch, several), (other, not several)):
        assert (each.cu_seqlens[0], each.cu_seqlens[-1]) == (0, 2 * S)
        assert (len(set(np.diff(each.cu_seqlens))) > 1) == expected


def test_without_documents_and_masks_there_is_one_path(tmp_path):
    batch = batch_of([[], []])
    assert list(warm_up.paths(batch, run_config(tmp_path, "--data.document_mask", "false"))) == [batch]


def test_all_positions_and_those_of_targets(tmp_path):
    config = run_config(tmp_path).model_copy(update={"task": "sft"})
    masked, whole = batch_of([[], [], [], []], [i < 3 for i in range(S)]), batch_of([[], [], [], []])
    assert masked.target_indices is not None and whole.target_indices is None
    assert list(warm_up.paths(masked, config))[1].target_indices is None
    assert list(warm_up.paths(whole, config))[1].target_indices.shape == masked.target_indices.shape == (64,)

"""No message can hang, and no memory is touched while it is under way: held against the programs of all ranks.

Every rank of a layout runs through the engine's real code in this process (`engine/testing/recorded.py`). What the
ranks did must fit together, and must come to its end on any hardware: with a stream for each communicator, with one
hardware queue, and with every operation blocking where it is launched.
"""

import errno
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from signal import SIGTERM
from typing import Any
from unittest import mock

import pytest
import torch

import engine.checkpoint.save
import engine.ops.fp8
import engine.train.step
import engine.train.trainer
import engine.train.warm_up
from engine.checkpoint.run_directory import checkpoints_dir, open_checkpoint
from engine.checkpoint.shares import write_share
from engine.checkpoint.storage import Storage
from engine.config.schema import Config
from engine.errors import Interrupted, NonFiniteError, StorageError, TriaxisError
from engine.ops import native
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout
from engine.testing.communication import Launch, Record, problems
from engine.testing.recorded import record_ranks, record_training, train_layout
from engine.testing.runs import losses, read_records, run_config, write_conversations, write_dataset
from engine.testing.simulator import MODES, find_hang
from engine.testing.traffic import phases, traffic
from engine.testing.turns import Lockstep
from engine.train.run import train
from engine.train.step import DistributedModel, StepResult, train_step

FP8 = ("--precision.mode=fp8", "--model.intermediate_size=192")
INTERLEAVED = ("--parallel.schedule=interleaved", "--parallel.virtual_stages=2")
ZERO_BUBBLE = ("--parallel.schedule=zero_bubble",)
AfterStep = Callable[[Lockstep, int, int], None]
HALF_THE_BYTES = ("--parallel.fp8_param_gather=true", "--parallel.grad_reduce_dtype=bf16")
UNSHARDED = ("--parallel.sharded_optimizer=false",)


@dataclass(frozen=True)
class Case:
    """A layout with the settings that it differs in; 4 microbatches a rank and step if not said otherwise."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    settings: tuple[str, ...] = ()
    preset: str = "tiny"
    microbatches: int = 4

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp)

    def __str__(self) -> str:
        words = (word.removeprefix("--").rpartition(".")[2] for word in self.settings)
        return " ".join([f"tp{self.tp} pp{self.pp} dp{self.dp}", self.preset, *words])


CASES = [
    Case(tp=2),
    Case(tp=4),
    Case(dp=2),
    Case(dp=3, settings=UNSHARDED),
    Case(pp=2),
    Case(pp=2, microbatches=1),
    Case(pp=3, microbatches=5),
    Case(pp=4),
    Case(pp=2, settings=("--parallel.schedule=gpipe",)),
    Case(pp=4, settings=("--parallel.schedule=gpipe",), microbatches=6),
    Case(pp=2, settings=ZERO_BUBBLE),
    Case(pp=4, settings=ZERO_BUBBLE, microbatches=7),
    Case(pp=2, settings=INTERLEAVED),
    Case(pp=2, settings=(*INTERLEAVED, "--model.num_layers=6", "--parallel.virtual_stages=3")),
    Case(pp=4, settings=(*INTERLEAVED, "--model.num_layers=8"), microbatches=8),
    Case(tp=2, pp=2),
    Case(tp=2, pp=2, settings=INTERLEAVED),
    Case(tp=2, pp=2, settings=ZERO_BUBBLE),
    Case(tp=2, pp=2, settings=("--parallel.schedule=gpipe",)),
    Case(tp=2, dp=2),
    Case(tp=2, dp=2, settings=UNSHARDED),
    Case(pp=2, dp=2),
    Case(pp=2, dp=2, settings=UNSHARDED),
    Case(pp=2, dp=2, settings=ZERO_BUBBLE),
    Case(pp=2, dp=2, settings=INTERLEAVED),
    Case(pp=4, dp=2, settings=(*INTERLEAVED, "--model.num_layers=8")),
    Case(tp=2, pp=2, dp=2),
    Case(tp=2, pp=2, dp=2, settings=(*ZERO_BUBBLE, *UNSHARDED)),
    Case(pp=2, preset="tiny-starcoder2"),
    Case(pp=3, dp=2, preset="tiny-starcoder2"),
    Case(tp=2, pp=2, preset="tiny-starcoder2", settings=ZERO_BUBBLE),
    Case(tp=2, pp=2, dp=2, preset="tiny-starcoder2"),
    Case(tp=4, preset="tiny", settings=("--model.num_kv_heads=2",)),
    Case(tp=4, dp=2, settings=("--model.num_kv_heads=1",), microbatches=1),
    Case(tp=2, settings=("--model.vocab_size=259",)),
    Case(tp=2, pp=2, settings=("--model.vocab_size=259", "--train.z_loss=0.01")),
    Case(tp=2, settings=("--parallel.recompute=selective",)),
    Case(tp=2, pp=2, settings=("--parallel.recompute=full",)),
    Case(tp=2, settings=("--parallel.recompute=full", "--parallel.recompute_layers=1")),
    Case(tp=2, preset="tiny-qwen2"),
    Case(tp=2, preset="tiny-qwen3"),
    Case(tp=2, settings=FP8),
    Case(tp=2, dp=2, settings=(*FP8, "--precision.recipe=delayed")),
    Case(tp=2, pp=2, settings=(*FP8, "--precision.recipe=blockwise")),
    Case(tp=2, settings=(*FP8, "--precision.recipe=delayed", "--parallel.recompute=selective")),
    Case(tp=2, dp=2, settings=(*FP8, "--parallel.fp8_param_gather=true")),
    Case(pp=2, dp=2, settings=(*FP8, "--precision.recipe=delayed", "--parallel.fp8_param_gather=true", *ZERO_BUBBLE)),
    Case(dp=3, settings=("--parallel.grad_reduce_dtype=bf16",)),
    Case(tp=2, dp=2, settings=(*UNSHARDED, "--parallel.grad_reduce_dtype=bf16")),
    Case(pp=2, dp=2, preset="tiny-starcoder2", settings=("--parallel.grad_reduce_dtype=bf16", *INTERLEAVED)),
]


def config_of(case: Case, directory: Path, *settings: str) -> Config:
    sizes = {"tp": case.tp, "pp": case.pp}
    parallel = [f"--parallel.{axis}={size}" for axis, size in sizes.items()]
    batch = f"--batch.global={case.microbatches * case.dp}"
    return run_config(directory, *parallel, batch, *case.settings, *settings, preset=case.preset)


def assert_sound(records: list[Record], *, symmetric: bool = False) -> None:
    assert problems(records, symmetric=symmetric) == []
    for mode in MODES:
        assert find_hang(records, mode) is None, mode


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """About a gradient bucket a layer, so that reductions and gathers overlap with computation."""
    monkeypatch.setattr(engine.train.step, "ShardedParameters", partial(ShardedParameters, bucket_size=10_000))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_programs_of_all_ranks_fit_together_and_end(tmp_path: Path, case: Case) -> None:
    program = partial(train_layout, config_of(case, tmp_path), case.layout)
    ranks = record_ranks(case.layout.world_size, program)
    assert_sound([rank.record for rank in ranks])
    assert all(math.isfinite(loss) for rank in ranks for loss in rank.result)
    assert any(loss > 0 for rank in ranks for loss in rank.result)


@dataclass(frozen=True)
class Run:
    """A run of the real trainer on all ranks in lockstep: what they did, and the error with which each ended."""

    records: list[Record]
    errors: list[TriaxisError | None]


def run_training(config: Config, world_size: int, after_step: AfterStep | None = None) -> Run:
    """Train; `after_step(lockstep, rank, step)` is called on each rank before it reports the step."""
    lockstep = Lockstep()

    def program() -> TriaxisError | None:
        try:
            train(config)
        except TriaxisError as error:
            return error
        return None

    def step_and_call(model: DistributedModel, *arguments: Any, step: int, **options: Any) -> StepResult:
        result = train_step(model, *arguments, step=step, **options)
        if after_step is not None:
            after_step(lockstep, model.world.rank, step)
        return result

    quiet, stepping = redirect_stdout(StringIO()), mock.patch.object(engine.train.trainer, "train_step", step_and_call)
    with quiet, stepping:
        ranks = record_ranks(world_size, program, turns=lockstep)
    return Run([rank.record for rank in ranks], [rank.result for rank in ranks])


def assert_all_end_with(run: Run, kind: type[TriaxisError], message: str) -> None:
    assert {type(error) for error in run.errors} == {kind}
    assert all(message in str(error) for error in run.errors)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "corpus")
    return tmp_path


EVALUATING = ("--train.eval_steps=1", "--train.eval_interval=2")
TWO_BY_TWO = Case(tp=2, pp=2)


def test_a_run_that_evaluates_and_saves_resumes_in_another_layout(corpus: Path) -> None:
    first, second = TWO_BY_TWO, Case(tp=2, dp=2, microbatches=2)
    settings = (*EVALUATING, "--checkpoint.interval=2", *FP8, "--precision.recipe=delayed", *HALF_THE_BYTES)
    for case, steps in (first, 3), (second, 5):
        config = config_of(case, corpus, *settings, f"--train.steps={steps}")
        run = run_training(config, case.layout.world_size)
        assert run.errors == [None] * 4
        assert_sound(run.records)
        assert open_checkpoint(config.run.dir).state.step == steps
    records = read_records(config.run.dir / "metrics.jsonl")
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2, 3, 4, 5]
    assert all(math.isfinite(loss) for loss in losses(records)) and len(losses(records)) == 5


def test_a_skipped_step_changes_nothing_for_the_other_ranks(corpus: Path) -> None:
    config = config_of(Case(pp=2, dp=2), corpus, *EVALUATING, "--train.steps=3")
    with overflow(rank=3, step=2):
        run = run_training(config, 4)
    assert run.errors == [None] * 4
    assert_sound(run.records)
    assert [record["skipped"] for record in read_records(config.run.dir / "metrics.jsonl") if "loss" in record] == [
        0,
        1,
        0,
    ]


def test_all_ranks_give_up_after_too_many_skipped_steps(corpus: Path) -> None:
    config = config_of(TWO_BY_TWO, corpus, "--train.max_nonfinite_steps=1", "--train.steps=3")
    with overflow(rank=2, step=2):
        run = run_training(config, 4)
    assert_all_end_with(run, NonFiniteError, "the last 1 steps up to 2 had NaN or infinite gradients")
    assert_sound(run.records)


@contextmanager
def overflow(rank: int, step: int) -> Iterator[None]:
    """Make the gradients of one rank infinite in one step."""
    reduce_gradients, steps = ShardedParameters.reduce_gradients, Counter[int]()

    def reduce(self: ShardedParameters) -> None:
        reduce_gradients(self)
        steps[self.world.rank] += 1
        if self.world.rank == rank and steps[rank] == step:
            for bucket in self.buckets:
                bucket.grad.fill_(torch.inf)

    with mock.patch.object(ShardedParameters, "reduce_gradients", reduce):
        yield


def test_all_ranks_stop_early_together(corpus: Path) -> None:
    settings = ("--train.eval_steps=1", "--train.eval_interval=1", "--train.early_stopping=2", "--optimizer.lr=1e-30")
    config = config_of(Case(pp=2, dp=2), corpus, *settings, "--checkpoint.keep_best=true", "--train.steps=9")
    run = run_training(config, 4)
    assert run.errors == [None] * 4
    assert_sound(run.records)
    assert open_checkpoint(config.run.dir).state.step == 2


def test_a_signal_between_steps_ends_all_ranks_with_a_checkpoint(corpus: Path) -> None:
    def terminate(lockstep: Lockstep, rank: int, step: int) -> None:
        if (rank, step) == (1, 2):
            lockstep.signal(rank, SIGTERM)

    config = config_of(Case(tp=2, dp=2), corpus, "--train.steps=9")
    run = run_training(config, 4, terminate)
    assert_all_end_with(run, Interrupted, "stopped by SIGTERM after step 2; the state is saved")
    assert_sound(run.records)
    assert open_checkpoint(config.run.dir).state.step == 2


def test_all_ranks_fail_together_if_one_cannot_write_its_part_of_a_checkpoint(corpus: Path) -> None:
    def write(files: Storage, partial: Path, slices: Any, rank: int, world_size: int) -> None:
        if rank == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_share(files, partial, slices, rank, world_size)

    config = config_of(TWO_BY_TWO, corpus, "--train.steps=2")
    with mock.patch.object(engine.checkpoint.save, "write_share", write):
        run = run_training(config, 4)
    assert_all_end_with(run, StorageError, "checkpoint not saved: rank 2: [Errno 28] No space left on device")
    assert_sound(run.records)
    assert not [path for path in checkpoints_dir(config.run.dir).iterdir() if path.is_dir()]


@pytest.mark.parametrize("case", [Case(tp=2, dp=2), Case(pp=2, dp=2, settings=ZERO_BUBBLE)], ids=str)
def test_fine_tuning_on_packed_conversations(tmp_path: Path, case: Case) -> None:
    chats = write_conversations(tmp_path / "chats")
    paths = (f"--data.train=[{{path: {chats}}}]", f"--data.valid=[{{path: {chats}}}]", "--task=sft")
    config = config_of(case, tmp_path, *paths, *EVALUATING, "--train.steps=2")
    run = run_training(config, 4)
    assert run.errors == [None] * 4
    assert_sound(run.records)


def test_the_warm_up_computes_what_ranks_share_and_sends_nothing_between_stages(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.train.warm_up, "first_use_waits", lambda device: True)
    settings = (*FP8, "--precision.recipe=delayed", *EVALUATING, *ZERO_BUBBLE, "--train.steps=2")
    run = run_training(config_of(TWO_BY_TWO, corpus, *settings), 4)
    assert run.errors == [None] * 4
    assert_sound(run.records)
    for record in run.records:
        launches = [event for event in record.events if isinstance(event, Launch)]
        begin, end = (number for number, one in enumerate(launches) if "warm_up.py" in one.caller)
        assert {launch.group.axis for launch in launches[begin + 1 : end]} == {"tp"}


needs_csrc = pytest.mark.skipif(bool(native.WHY_NOT), reason="the shape functions stand for csrc's kernels")


@needs_csrc
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_takes_the_branches_of_a_gpu_on_the_meta_device(tmp_path: Path, recipe: str) -> None:
    case = Case(tp=2, pp=2, settings=(*FP8, f"--precision.recipe={recipe}"))
    with mock.patch.object(engine.ops.fp8, "_on_gpu", wraps=engine.ops.fp8._on_gpu) as matmul:
        records = record_training(config_of(case, tmp_path), case.layout, device="meta")
    assert matmul.called
    assert_sound(records)
    # Forward passes, of two steps and the evaluation, gather tokens in FP8; backward passes gather saved ones again.
    layers, microbatches, forward, backward = 2, 4, 3, 2
    launches = [event for event in records[0].events if isinstance(event, Launch) and event.kind == "all_gather"]
    in_fp8 = sum(launch.dtype == "uint8" for launch in launches)
    assert in_fp8 == 2 * layers * microbatches * (forward + backward)


@dataclass(frozen=True)
class Llama2:
    """Bytes that a rank of the first stage of Llama-2-7B sends in a step, tp 2 × pp 2 × dp 2, by hand."""

    tokens = 2 * 4096  # two microbatches of a sequence
    hidden = 4096
    layers = 16
    parameters = (32000 * 4096 + 16 * (4 * 4096**2 + 3 * 4096 * 11008)) // 2 + 16 * 2 * 4096
    half = 2  # of each exchanged tensor a rank sends (n - 1)/n with n = 2

    def tp(self, *, fp8: bool) -> int:
        unit = self.tokens * self.hidden * 2 // self.half  # all tokens in bf16
        # Forward and backward: tokens gathered for qkv and gate_up (again in the backward pass), outputs scattered for
        # o and down; gradients the other way round. In FP8 the tokens are bytes, with an fp32 scale for each 128.
        tokens = unit * (128 + 4) // 256 if fp8 else unit
        layer = 4 * tokens + 6 * unit
        norms = 2 * 2 * self.hidden * 4 // self.half  # fp32 gradients of two norms, all-reduced
        return self.layers * (layer + norms) + 2 * unit  # and the embedding

    def dp(self) -> int:
        return self.parameters * (4 + 2) // self.half  # fp32 gradients scattered, bf16 parameters gathered

    def forward(self) -> int:
        return self.tokens * self.hidden * 2 // 2  # the tokens of a tp rank


@needs_csrc
@pytest.mark.parametrize("mode", ["bf16", "fp8"])
def test_llama2_7b_sends_the_bytes_computed_by_hand(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # buckets of the real size
    settings = (f"--precision.mode={mode}", "--precision.recipe=blockwise", "--data.seq_length=4096")
    case = Case(tp=2, pp=2, dp=2, preset="llama2-7b", settings=settings, microbatches=2)
    ranks = [rank for rank in range(8) if case.layout.coordinates(rank).dp == 0]  # the others do the same
    records = record_training(config_of(case, tmp_path), case.layout, steps=1, ranks=ranks, device="meta")
    assert_sound(records, symmetric=True)
    by_axis: Counter[str] = Counter()
    for (axis, _), sent in traffic(phases(records[0])["step 1"]).sent.items():
        by_axis[axis] += sent
    expected = Llama2()
    assert by_axis["tp"] == expected.tp(fp8=mode == "fp8")
    assert by_axis["dp"] == expected.dp()
    assert by_axis["forward"] == expected.forward()
    assert by_axis["world"] == 2 * 4 * 7 // 8  # the gradient norm

"""The choice between MKL and oneDNN at the start of a run. That of FP8 algorithms: tests/csrc/test_cublaslt.py."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.config.schema import Config
from engine.ops import linear
from engine.ops.linear import MATMUL_KINDS
from engine.parallel.layout import Layout, init_distributed
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import random_batches, read_records, run_config
from engine.train.log import RunLog
from engine.train.measure import choose_onednn
from engine.train.run import train
from engine.train.step import build_model

FP32 = torch.float32


def measuring(directory: Path, *overrides: str, **options: int) -> Config:
    given = ("--ops.measure", "true", "--ops.measured_dir", str(directory / "machine"))
    return run_config(directory, *given, *overrides, **options)


def record_kinds(monkeypatch) -> set[str]:
    """Let oneDNN compute matmuls of any size, and note the kinds of these."""
    seen: set[str] = set()
    onednn = linear._onednn

    def spy(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.add(linear._kind(a, b, a.shape[0]))
        return onednn(a, b, bias)

    monkeypatch.setattr(linear, "_MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(linear, "_onednn", spy)
    return seen


@pytest.mark.parametrize("passes", [linear._PASSES, (), *zip(linear._PASSES, strict=True)], ids=str)
@pytest.mark.parametrize("overrides", [(), ("--parallel.recompute", "full"), ("--batch.micro", "2")], ids=str)
def test_a_step_takes_the_library_of_each_kind(workspace, monkeypatch, passes, overrides):
    seen, config = record_kinds(monkeypatch), run_config(workspace, *overrides)
    kinds = {f"small {name}" for name in passes}
    model, _ = build_model(config, world_of(), FP32, seed=1, onednn=frozenset(kinds))
    model.train(random_batches(config), 1.0)
    model.evaluate(random_batches(config))
    assert seen == kinds


def step_on_ranks(config: Config, tp: int, *kinds: str) -> tuple[set[str], float]:
    """The kinds that oneDNN computed, and the loss."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = record_kinds(monkeypatch)
        model, _ = build_model(config, world_of(Layout(tp=tp)), FP32, seed=1, onednn=frozenset(kinds))
        loss = model.train(random_batches(config), 1.0).item()
        return seen, loss


@pytest.mark.parametrize("kinds", [("small weight gradient",), ("small forward", "small input gradient")], ids=str)
def test_tensor_parallel_layers_take_the_library_of_each_kind(workspace, kinds):
    config = run_config(workspace, "--parallel.tp", "2")
    (first, loss), (second, _) = run_ranks(2, step_on_ranks, config, 2, *kinds)
    assert first == second == set(kinds)
    _, alone = step_on_ranks(run_config(workspace), 1)
    assert loss == pytest.approx(alone, rel=1e-6)  # of 128 tokens, summed


def chosen(config: Config, dtype: torch.dtype = FP32) -> frozenset[str]:
    log = RunLog(config.run.dir, active=True)
    try:
        return choose_onednn(config, world_of(), dtype, log)
    finally:
        log.close()


def test_the_choice_is_measured_said_and_kept(workspace, monkeypatch, capsys):
    monkeypatch.setattr(linear, "measure_onednn", lambda: frozenset({"small forward", "large forward"}))
    assert chosen(measuring(workspace)) == {"small forward", "large forward"}
    assert capsys.readouterr().out == (
        "matmuls     fp32, as measured: oneDNN for large forward, small forward; MKL for the rest "
        f"(kept in {workspace / 'machine'})\n"
    )
    monkeypatch.setattr(linear, "measure_onednn", lambda: pytest.fail("measured again"))
    assert chosen(measuring(workspace, "--run.dir", str(workspace / "other"))) == {"small forward", "large forward"}


@pytest.mark.skipif(not linear.has_onednn(), reason="PyTorch was built without oneDNN")
def test_it_is_really_measured(workspace):
    assert chosen(measuring(workspace)) <= MATMUL_KINDS
    assert len(list((workspace / "machine").iterdir())) == len(list((workspace / "run" / "measured").iterdir())) == 1


@pytest.mark.parametrize("case", ["ops.measure", "bf16", "deterministic"])
def test_without_measuring_the_choice_is_the_same_everywhere(workspace, monkeypatch, case):
    monkeypatch.setattr(linear, "measure_onednn", lambda: pytest.fail("measured"))
    torch.use_deterministic_algorithms(case == "deterministic")
    try:
        config = measuring(workspace, "--ops.measure", str(case != "ops.measure").lower())
        assert chosen(config, torch.bfloat16 if case == "bf16" else FP32) == MATMUL_KINDS
    finally:
        torch.use_deterministic_algorithms(False)
    assert not (workspace / "machine").exists()


def choose_by_rank(directory: Path) -> tuple[frozenset[str], bool]:
    """Every rank would measure another result, and keeps it in another place."""
    world, measured = init_distributed("cpu"), []
    own = frozenset({sorted(MATMUL_KINDS)[world.rank]})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(linear, "measure_onednn", lambda: measured.append(1) or own)
        place = directory / str(world.rank)
        config = measuring(directory, "--run.dir", str(place / "run"), "--ops.measured_dir", str(place / "machine"))
        return choose_onednn(config, world, FP32, RunLog(config.run.dir, active=world.is_main)), bool(measured)


def test_all_ranks_take_the_choice_of_the_first(workspace):
    of_rank_0 = frozenset({sorted(MATMUL_KINDS)[0]})
    assert run_ranks(3, choose_by_rank, workspace) == [(of_rank_0, True), (of_rank_0, False), (of_rank_0, False)]


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in read_records(config.run.dir / "metrics.jsonl")]


def test_a_resumed_run_keeps_its_choice_where_that_of_the_machine_is_gone(workspace, monkeypatch):
    seen = record_kinds(monkeypatch)
    monkeypatch.setattr(linear, "measure_onednn", lambda: frozenset({"small forward"}))
    constant = ("--lr_schedule.kind", "constant")
    whole = measuring(workspace, *constant, "--run.dir", str(workspace / "whole"), steps=4)
    train(whole)
    train(measuring(workspace, *constant, steps=2))
    shutil.rmtree(workspace / "machine")
    monkeypatch.setattr(linear, "measure_onednn", lambda: frozenset({"small weight gradient"}))
    train(measuring(workspace, *constant, steps=4))
    assert seen == {"small forward"}
    assert losses(measuring(workspace)) == losses(whole)

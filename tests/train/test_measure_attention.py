"""The choice of attention at the start of a run on a GPU. There is none here: what would use it is replaced."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config.schema import Config
from engine.ops.attention_choice import AttentionImpls
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import run_config
from engine.train import measure
from engine.train.inputs import open_inputs
from engine.train.log import RunLog
from engine.train.measure import attention_problems, choose_attention

BF16, GPU = torch.bfloat16, torch.device("cuda", 0)


def measuring(directory: Path, *overrides: str) -> Config:
    given = ("--ops.measure", "true", "--ops.measured_dir", str(directory / "machine"))
    return run_config(directory, *given, *overrides)


def chosen(config: Config, found: dict[str, str]) -> AttentionImpls:
    """The choice where these implementations are the fastest, by kind of batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "attention_key", lambda problem: {"what": "attention", "of": str(problem.cu_seqlens)})
        patch.setattr(measure, "measure_attention", lambda problem: found[problem.kind])
        world = world_of()
        log, inputs = RunLog(config.run.dir, active=world.is_main), open_inputs(config, world)
        try:
            return choose_attention(config, replace(world, device=GPU), inputs, log)
        finally:
            log.close()


def test_problems_are_those_of_this_rank(tmp_path):
    config = run_config(tmp_path, "--batch.micro", "2", "--batch.global", "2")
    length, model = config.data.seq_length, config.model
    whole, documents = attention_problems(config, replace(world_of(), device=GPU), BF16, length / 4)
    assert whole.cu_seqlens == (0, length, 2 * length)
    assert len(documents.cu_seqlens) == 9
    assert documents.cu_seqlens[-1] == 2 * length
    assert (whole.kind, documents.kind) == ("plain", "documents")
    assert (whole.heads, whole.kv_heads, whole.head_dim) == (model.num_heads, model.num_kv_heads, model.head_dim)
    assert (whole.device, whole.dtype) == (GPU, BF16)
    without = run_config(tmp_path, "--data.document_mask", "false")
    assert len(attention_problems(without, replace(world_of(), device=GPU), BF16, 10.0)) == 1


def test_each_window_of_the_layers_is_measured(tmp_path):
    window = ("--model.sliding_window", "4")
    some = run_config(tmp_path, *window, "--model.window_layers", "[0, 2]")
    kinds = [
        [problem.kind for problem in attention_problems(config, replace(world_of(), device=GPU), BF16, 32)]
        for config in (some, run_config(tmp_path, *window))
    ]
    assert kinds == [["plain", "documents", "windows", "windows"], ["windows", "windows"]]


def test_the_choice_is_said_and_kept(workspace, capsys):
    expected = AttentionImpls("flash_attn_4", "cudnn")
    assert chosen(measuring(workspace), {"plain": "flash_attn_4", "documents": "cudnn"}) == expected
    said = "attention   as measured: flash_attn_4 for sequences of one length, cudnn for documents (kept in"
    assert said in capsys.readouterr().out
    assert chosen(measuring(workspace), {}) == expected
    assert chosen(measuring(workspace, "--run.dir", str(workspace / "other")), {}) == expected


@pytest.mark.parametrize("case", ["ops.measure", "ops.attention", "deterministic"])
def test_without_measuring_it_is_pytorchs(workspace, case):
    torch.use_deterministic_algorithms(case == "deterministic")
    try:
        given = {"ops.measure": ("--ops.measure", "false"), "ops.attention": ("--ops.attention", "sdpa")}.get(case, ())
        assert chosen(measuring(workspace, *given), {}) == AttentionImpls("auto", "auto")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not (workspace / "machine").exists()


def choose_by_rank(directory: Path) -> AttentionImpls:
    """Every rank would measure another result, and keeps it in another place."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else world_of().rank
    place = directory / str(rank)
    config = measuring(
        directory, "--run.dir", str(place / "run"), "--ops.measured_dir", str(place), "--batch.global", "3"
    )
    names = ("flash_attn", "flash_attn_3", "flash_attn_4")
    return chosen(config, {"plain": names[rank], "documents": names[rank]})


def test_all_ranks_take_the_choice_of_the_first(workspace):
    assert run_ranks(3, choose_by_rank, workspace) == [AttentionImpls("flash_attn", "flash_attn")] * 3

import pytest
import torch

from engine.parallel.layout import Layout
from engine.plan.describe import describe_run
from engine.testing.runs import run_config


def lines(config, layout: Layout, dtype=torch.bfloat16, device_type: str = "cuda", reason: str = "why") -> list[str]:
    return list(describe_run(config, layout, reason, dtype, device_type))


def llama(tmp_path, *overrides: str):
    settings = ("--data.seq_length", "4096", "--batch.global", "1024", "--train.steps", "100000")
    return run_config(tmp_path, *settings, *overrides, preset="llama2-7b")


def test_three_axes(tmp_path):
    *found, header, first, last = lines(llama(tmp_path), Layout(tp=2, pp=2, dp=16))
    assert found == [
        "model       6,738,415,616 parameters, 42.86 GFLOP per token",
        "flops       6 · multiplying parameters + 6 · layers · sequence · heads · head size (causal attention)",
        "layout      64 ranks = tp 2 × pp 2 × dp 16; neighbors differ in tp, then in dp, then in pp",
        "            why",
        "batch       1024 sequences = dp 16 × 64 microbatches of 1; 4,194,304 tokens per step",
        "run         100,000 steps = 419,430,400,000 tokens",
        "pipeline    1f1b; its bubble adds 1.6% to the time of a step",
    ]
    kinds = "weights  gradients  optimizer  activations  links  workspace  total GiB"
    assert header == f"per rank    ranks  layers              parameters  {kinds}"
    assert first.startswith("stage 0     0–31   embedding, 0–15  1,684,668,416      3.1        6.3        1.2  ")
    assert last.startswith("stage 1     32–63  16–31, head      1,684,672,512      3.1        6.3        1.2  ")
    for line in (first, last):
        *sizes, total = map(float, line.split()[-7:])
        assert sum(sizes) == pytest.approx(total, abs=0.3)


def test_a_single_rank_has_no_pipeline_and_no_order(tmp_path):
    found = lines(run_config(tmp_path, "--batch.global", "1"), Layout(), torch.float32, "cpu")
    assert "layout      1 rank = tp 1 × pp 1 × dp 1" in found
    assert "batch       1 sequences = dp 1 × 1 microbatch of 1; 32 tokens per step" in found
    assert not any(line.startswith("pipeline") for line in found)
    assert found[-2].endswith("total MiB")
    assert found[-1].startswith("stage 0     0      embedding, 0–3, head")


def test_the_parts_of_an_interleaved_stage(tmp_path):
    overrides = ("--parallel.schedule", "interleaved", "--parallel.virtual_stages", "2")
    *_, pipeline, _, first, second = lines(llama(tmp_path, *overrides), Layout(pp=2, dp=4))
    assert pipeline == "pipeline    interleaved, 2 chunks per stage; its bubble adds 0.2% to the time of a step"
    assert "  embedding, 0–7, 16–23  " in first
    assert "  8–15, 24–31, head  " in second


def test_stages_with_one_layer_or_none(tmp_path):
    config = run_config(tmp_path, "--parallel.layers_per_stage", "[0, 1, 3, 0]")
    stages = lines(config, Layout(pp=4))[-4:]
    for stage, held in zip(stages, ("embedding", "0", "1–3", "head"), strict=True):
        assert f"  {held}  " in stage


def test_a_long_reason_stays_in_its_column(tmp_path):
    found = lines(run_config(tmp_path), Layout(), reason="because " * 30)
    reasons = [line for line in found if "because" in line]
    assert len(reasons) == 3
    assert all(line.startswith(" " * 12 + "because") and len(line) <= 120 for line in reasons)


def test_columns_are_aligned_whatever_is_in_them(tmp_path):
    config = llama(tmp_path, "--parallel.layers_per_stage", str([4] * 8))
    table = lines(config, Layout(pp=8, tp=8, dp=16))[-9:]
    assert len(set(map(len, table))) == 1
    assert table[-1].split()[:2] == ["stage", "7"] and "896–1023  28–31, head" in table[-1]

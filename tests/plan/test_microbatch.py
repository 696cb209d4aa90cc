"""The rule for `batch.micro`, beside what was measured and beside all sizes."""

import pytest
import torch

from engine.config.load import load
from engine.config.schema import Config
from engine.model.families import PRESETS
from engine.parallel.layout import Layout
from engine.plan.layouts import choose_layout, with_micro
from engine.plan.memory import GIB, ClusterSpec, estimate_fullest
from engine.plan.microbatch import describe_microbatches, memory_limit, microbatch_sizes, recommended
from engine.plan.throughput import step_seconds

H200_GIB = 139.8
BF16_MOMENTS = ("--optimizer.moments", "bf16")
ONE_H200 = ("--batch.global", "8", "--data.document_mask", "false", "--parallel.tp", "1", "--parallel.pp", "1")


def config_of(*overrides: str) -> Config:
    return load("examples/configs/llama2_7b.yaml", overrides, presets=PRESETS)


def gpus(count: int, gib: float = 80) -> ClusterSpec:
    return ClusterSpec(count, min(count, 8), int(gib * GIB), "cuda", torch.bfloat16)


def choice(layout: Layout, gib: float, *overrides: str) -> int | None:
    config, ranks = config_of(*overrides), gpus(layout.world_size, gib)
    found = recommended(microbatch_sizes(config, layout, ranks), memory_limit(config, ranks))
    return found and found.micro


@pytest.mark.parametrize(("mode", "one", "two"), [("bf16", 12950, 13511), ("fp8", 17512, 18377)])
def test_speeds_that_were_measured(mode, one, two):
    """Tokens/s of llama2-7b on one H200, with 8 microbatches of one sequence and 4 of two: docs/measurements.md."""
    config = config_of(*ONE_H200, "--precision.mode", mode)
    ratio = step_seconds(config, Layout()) / step_seconds(with_micro(config, 2), Layout())
    assert ratio == pytest.approx(two / one, abs=0.01)
    assert 32768 / step_seconds(config, Layout()) == pytest.approx(one, rel=0.01)


def test_what_was_faster_on_an_h200_is_recommended_there():
    assert choice(Layout(), H200_GIB, *ONE_H200) == 1  # two do not fit with fp32 moments
    assert choice(Layout(), H200_GIB, *ONE_H200, *BF16_MOMENTS) == 2
    assert choice(Layout(), H200_GIB, *ONE_H200, *BF16_MOMENTS, "--precision.mode", "fp8") == 2


def test_the_example_has_what_is_recommended_for_80_gib():
    """And its comment says what is for 141 GB."""
    for ranks in (8, 64):
        assert choice(Layout(dp=ranks), 80) == config_of().batch.micro
        assert choice(Layout(dp=ranks), H200_GIB) == 2


@pytest.mark.parametrize("gib", [91, 94, 100, 110, 139.8])
def test_what_is_recommended_leaves_the_layout_that_auto_chose(gib):
    config, ranks = config_of(), gpus(8, gib)
    layout, _ = choose_layout(config, ranks)
    best = choice(layout, gib)
    assert best is not None
    assert choose_layout(with_micro(config, best), ranks)[0] == layout


def test_in_a_pipeline_the_bubble_counts():
    pipeline = Layout(pp=4, dp=2)
    assert choice(pipeline, 600, "--batch.global", "1024") == 2
    assert choice(pipeline, 600, "--batch.global", "32") == 1
    assert choice(pipeline, 600, "--batch.global", "32", "--batch.micro", "4") == 1
    assert choice(Layout(dp=8), 600, "--batch.global", "32") == 2


@pytest.mark.parametrize("layout", [Layout(dp=8), Layout(tp=2, dp=4), Layout(pp=4, dp=2), Layout(tp=2, pp=2, dp=2)])
@pytest.mark.parametrize("gib", [24, 48, 80, 140, 300])
def test_the_smallest_within_two_percent_of_the_fastest_that_fits(layout, gib):
    """Against all sizes, each looked at as if it had been asked for."""
    ranks, fitting = gpus(8, gib), {}
    for micro in range(1, 96 // layout.dp + 1):
        if 96 // layout.dp % micro == 0:
            config = config_of("--batch.global", "96", "--batch.micro", str(micro))
            if estimate_fullest(config, layout, torch.bfloat16, "cuda").total <= 0.98 * ranks.capacity:
                fitting[micro] = step_seconds(config, layout)
    expected = min((m for m, s in fitting.items() if s <= 1.02 * min(fitting.values())), default=None)
    assert choice(layout, gib, "--batch.global", "96") == expected


def test_sizes_that_the_layout_does_not_allow_are_left_out():
    """Tensor parallelism divides the tokens of a microbatch, and FP8 needs a multiple of 16."""
    odd = ("--batch.global", "24", "--batch.micro", "4", "--data.seq_length", "4094")
    for precision, expected in (("bf16", [2, 4, 6, 12]), ("fp8", [])):
        config = config_of(*odd, "--precision.mode", precision)
        assert [size.micro for size in microbatch_sizes(config, Layout(tp=4, dp=2), gpus(8, 600))] == expected
    config = config_of(*odd, "--batch.micro", "8", "--precision.mode", "fp8")
    assert [size.micro for size in microbatch_sizes(config, Layout(dp=1), gpus(1, 600))] == [8, 24]


def lines(layout: Layout, gib: float, *overrides: str) -> list[str]:
    return list(describe_microbatches(config_of(*overrides), layout, gpus(layout.world_size, gib)))


def test_the_table_and_the_advice():
    header, one, two, four, *advice = lines(
        Layout(), H200_GIB, *ONE_H200, *BF16_MOMENTS, "--precision.mode", "fp8", "--precision.recipe", "delayed"
    )
    assert header == "microbatch  batch.micro  microbatches  peak GiB  free GiB  predicted speed"
    assert one.split() == ["1", "8", "118.5", "21.3", "1.00×", "configured"]
    assert two.split() == ["2", "4", "135.2", "4.6", "1.05×", "tight"]
    assert four.split()[:2] == ["4", "2"] and four.endswith("does not fit")
    assert [line.strip() for line in advice] == [
        "recommended: batch.micro = 2, 1.05× the speed by a model of one H200, 135.2 of 139.8 GiB",
        "batch.micro = 2 is tight (more than 90%): set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ]


def test_what_bf16_moments_would_make_room_for():
    *_, last = lines(Layout(), H200_GIB, *ONE_H200)
    assert last.strip() == "with batch.micro = 2 and optimizer.moments = bf16: 1.04× the speed, 126.7 GiB"
    assert not any("moments" in line for line in lines(Layout(), H200_GIB, *ONE_H200, *BF16_MOMENTS))
    assert not any("moments" in line for line in lines(Layout(dp=8), 80))  # sharded over 8, they would not make room


def test_a_size_that_is_nearly_as_fast_stays():
    *_, last = lines(Layout(dp=8), 300, "--batch.micro", "4")
    assert last.strip() == "batch.micro = 4 is within 2% of the fastest that fits"


def test_a_size_that_does_not_fit():
    configured = lines(Layout(dp=8), 80, "--batch.micro", "4")
    assert configured[3].endswith("0.97×  does not fit") or configured[3].endswith("1.00×  does not fit, configured")
    assert configured[-1].strip().startswith("recommended: batch.micro = 1, 0.95× the speed")
    assert not any("recommended" in line for line in lines(Layout(dp=8), 40))


def test_no_speed_of_a_cpu_is_predicted():
    ranks = ClusterSpec(1, 1, 8 * GIB, "cpu", torch.float32)
    assert list(describe_microbatches(config_of(), Layout(), ranks)) == []

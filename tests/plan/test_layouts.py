import re
from itertools import product

import pytest
import torch

from engine.config.load import load
from engine.config.schema import Config
from engine.errors import ConfigError, OutOfMemoryError
from engine.model.families import PRESETS
from engine.parallel.layout import Layout
from engine.plan.layouts import choose_layout, require_fit
from engine.plan.memory import GIB, ClusterSpec, estimate_fullest

SEVEN_B = "examples/configs/llama2_7b.yaml"
INTERLEAVED = ("--parallel.schedule", "interleaved", "--parallel.virtual_stages", "2")


def config_of(*overrides: str) -> Config:
    """The 7B example, whose tp and pp are auto."""
    return load(SEVEN_B, overrides, presets=PRESETS)


def gpus(count: int, gib: float = 80, per_node: int = 8) -> ClusterSpec:
    return ClusterSpec(count, min(count, per_node), int(gib * GIB), "cuda", torch.bfloat16)


def chosen(count: int, gib: float, *overrides: str) -> tuple[int, int, int]:
    layout = choose_layout(config_of(*overrides), gpus(count, gib))[0]
    return layout.tp, layout.pp, layout.dp


def message(ranks: ClusterSpec, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_layout(config_of(*overrides), ranks)
    return str(caught.value)


def refusal(ranks: ClusterSpec, *overrides: str) -> str:
    config = config_of(*overrides)
    with pytest.raises(OutOfMemoryError) as caught:
        require_fit(config, choose_layout(config, ranks)[0], ranks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("preset", "gib", "expected"),
    [
        ("llama2-7b", 24, {8: (8, 1, 1), 64: (4, 1, 16), 512: (4, 1, 128)}),
        ("llama2-7b", 40, {4: (4, 1, 1), 8: (4, 1, 2), 64: (2, 1, 32), 512: (2, 1, 256)}),
        ("llama2-7b", 80, {2: (2, 1, 1), 4: (2, 1, 2), 8: (1, 1, 8), 64: (1, 1, 64), 512: (1, 1, 512)}),
        ("llama2-7b", 139.8, {2: (1, 1, 2), 8: (1, 1, 8), 64: (1, 1, 64)}),
        ("llama3-8b", 80, {4: (2, 1, 2), 8: (2, 1, 4), 64: (1, 1, 64)}),
        ("llama3-8b", 139.8, {8: (1, 1, 8), 64: (1, 1, 64)}),
        ("qwen2.5-7b", 24, {16: (4, 2, 2)}),  # 28 heads: tp 8 does not divide them
        ("qwen3-8b", 40, {8: (4, 1, 2)}),
    ],
)
def test_what_auto_takes(preset, gib, expected):
    assert {count: chosen(count, gib, "--model.preset", preset) for count in expected} == expected


@pytest.mark.parametrize("overrides", [(), ("--parallel.pp", "4"), ("--parallel.tp", "2"), INTERLEAVED])
@pytest.mark.parametrize("gib", [30, 45, 80])
def test_auto_takes_the_smallest_that_fits_and_of_equals_the_larger_tp(overrides, gib):
    """Against all layouts of 16 ranks, each looked at as if it had been asked for."""
    ranks, fitting = gpus(16, gib), []
    for tp, pp in product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        config = config_of(*overrides)
        if config.parallel.tp not in ("auto", tp) or config.parallel.pp not in ("auto", pp):
            continue
        asked = config_of(*overrides, "--parallel.tp", str(tp), "--parallel.pp", str(pp))
        try:
            layout, reason = choose_layout(asked, ranks)
        except ConfigError:
            continue
        assert reason == "as configured"
        if estimate_fullest(asked, layout, torch.bfloat16, "cuda").total <= 0.9 * ranks.capacity:
            fitting.append((tp * pp, pp, layout))
    assert choose_layout(config_of(*overrides), ranks)[0] == min(fitting, key=lambda found: found[:2])[2]


def test_the_reason_has_the_numbers():
    needed = estimate_fullest(config_of(), Layout(dp=8), torch.bfloat16, "cuda").total / GIB
    fits = f"the smallest tp × pp whose fullest rank, {needed:.1f} GiB, fits in 90% of 80.0 GiB"
    assert choose_layout(config_of(), gpus(8))[1] == f"tp and pp auto: {fits}"
    assert choose_layout(config_of("--parallel.pp", "2"), gpus(8))[1].startswith("tp auto: ")
    assert choose_layout(config_of("--parallel.tp", "2"), gpus(8))[1].startswith("pp auto: ")


def test_tp_stays_within_a_node_unless_it_is_asked_for():
    tight = ClusterSpec(16, 4, 25 * GIB, "cuda", torch.bfloat16)
    assert choose_layout(config_of(), tight)[0] == Layout(tp=4, dp=4)
    odd = ClusterSpec(48, 6, 18 * GIB, "cuda", torch.bfloat16)
    assert choose_layout(config_of("--batch.global", "960"), odd)[0].tp == 2  # of 1, 2, 3 and 6, which also divides 32
    layout, reason = choose_layout(config_of("--parallel.tp", "8", "--parallel.pp", "1"), tight)
    assert layout == Layout(tp=8, dp=2)
    assert reason == "as configured; tp 8 spans nodes of 4 rank(s), over slower links"


def test_an_explicit_list_of_layers_says_how_many_stages():
    layers = ("--parallel.layers_per_stage", "[16, 16]")
    assert chosen(8, 80, *layers) == (1, 2, 4)
    assert chosen(8, 80, *layers, "--parallel.tp", "2") == (2, 2, 2)


def test_auto_finds_a_layout_for_an_odd_number_of_ranks():
    assert chosen(3, 80) == (1, 3, 1)
    assert chosen(48, 80) == (1, 3, 16)  # 1024 sequences are a multiple of 16 replicas, and of no more of 48 ranks


def test_a_batch_that_suits_no_layout_names_those_that_would():
    text = message(gpus(37))
    assert "no layout of 37 rank(s) works; the nearest, tp 1 × pp 1, fails because" in text
    assert "batch.global = 999 or 1036" in text
    for batch in ("999", "1036"):
        choose_layout(config_of("--batch.global", batch), gpus(37))
    odd = message(gpus(37), "--data.seq_length", "4095")  # where larger tp have problems of their own
    assert "the nearest, tp 1 × pp 1, fails because" in odd
    assert len(odd.splitlines()) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("--parallel.tp", "3"),
            "parallel.tp = 3 does not divide model.num_heads = 32 and model.intermediate_size = 11008 and "
            "batch.micro × data.seq_length = 4096; parallel.tp can be 1, 2, 4, 8, 16, 32",
        ),
        (
            ("--parallel.tp", "8", "--data.seq_length", "4090"),
            "does not divide batch.micro × data.seq_length = 4090; parallel.tp can be 1, 2",
        ),
        (
            ("--parallel.tp", "4", "--model.num_heads", "12", "--model.num_kv_heads", "6"),
            "neither divides model.num_kv_heads = 6 nor is a multiple of it; parallel.tp can be 1, 2",
        ),
        (
            ("--parallel.tp", "8", "--model.vocab_size", "7"),
            "is more than model.vocab_size = 7; parallel.tp can be 1, 2, 4",
        ),
        (("--parallel.tp", "16"), "8 rank(s) are not a multiple of parallel.tp × parallel.pp = 16 × 1; start 16 ranks"),
        (("--parallel.tp", "1", "--parallel.pp", "3"), "= 1 × 3; start 6 or 9 ranks, or change"),
        (
            ("--batch.global", "12"),
            "batch.micro × data-parallel ranks = 1 × 8 = 8; the nearest that work are batch.global = 8",
        ),
        (
            ("--parallel.pp", "8", "--model.num_layers", "6"),
            "= 8 parts are more than model.num_layers = 6; make it at most 6",
        ),
        (
            ("--parallel.pp", "4", *INTERLEAVED, "--model.num_layers", "6"),
            "parallel.pp × parallel.virtual_stages = 8 parts are more than model.num_layers = 6",
        ),
        (INTERLEAVED, "virtual_stages = 2 needs a pipeline, and parallel.pp = 1; make it 2 or more, or choose"),
        (
            ("--parallel.pp", "2", "--parallel.layers_per_stage", "[30, 3]"),
            "parallel.layers_per_stage = [30, 3] adds up to 33, and model.num_layers = 32; null divides",
        ),
    ],
)
def test_layouts_that_cannot_be(overrides, expected):
    assert expected in message(gpus(8), "--parallel.tp", "1", "--parallel.pp", "1", *overrides)


def test_all_problems_are_reported_at_once():
    text = message(gpus(8), "--parallel.tp", "3", "--parallel.pp", "40")
    assert len(text.splitlines()) == 3
    for part in ("start 120 ranks", "parallel.tp can be 1, 2, 4", "make it at most 32"):
        assert part in text


@pytest.mark.parametrize("overrides", [("--parallel.tp", "3"), ("--parallel.pp", "40"), ("--parallel.tp", "6")])
def test_auto_does_not_hide_what_is_wrong_with_the_other(overrides):
    text = message(gpus(24), *overrides)
    assert "no layout of 24 rank(s) works" in text
    assert "parallel.tp can be 1" in text or "make it at most 32" in text


AS_ASKED = ("--parallel.tp", "1", "--parallel.pp", "1")


@pytest.mark.parametrize(
    ("count", "gib", "overrides", "remedies"),
    [
        (1, 80, (), {"2 such ranks": "tp 2 × pp 1 × dp 1"}),
        (1, 24, (), {"8 such ranks": "tp 8 × pp 1 × dp 1"}),
        (
            1,
            130,
            (),
            {
                "parallel.recompute = full": "tp 1 × pp 1 × dp 1",
                "optimizer.moments = bf16": "tp 1 × pp 1 × dp 1",
                "2 such ranks": "tp 1 × pp 1 × dp 2",
            },
        ),
        (
            8,
            110,
            (*AS_ASKED, "--batch.micro", "4"),
            {
                "parallel.tp = auto and parallel.pp = auto": "tp 2 × pp 1 × dp 4",
                "parallel.recompute = selective": "tp 1 × pp 1 × dp 8",
                "batch.micro = 2": "tp 1 × pp 1 × dp 8",
            },
        ),
        (
            8,
            60,
            AS_ASKED,
            {
                "parallel.tp = auto and parallel.pp = auto": "tp 2 × pp 1 × dp 4",
                "parallel.recompute = full": "tp 1 × pp 1 × dp 8",
            },
        ),
        (
            8,
            80,
            (*AS_ASKED, "--batch.micro", "2"),
            {
                "parallel.tp = auto and parallel.pp = auto": "tp 2 × pp 1 × dp 4",
                "parallel.recompute = full": "tp 1 × pp 1 × dp 8",
                "batch.micro = 1": "tp 1 × pp 1 × dp 8",
            },
        ),
        (2, 36, ("--parallel.recompute", "full"), {"4 such ranks": "tp 4 × pp 1 × dp 1"}),
        (
            4,
            70,
            (*AS_ASKED, "--parallel.recompute", "full", "--parallel.recompute_layers", "1"),
            {
                "parallel.tp = auto and parallel.pp = auto": "tp 2 × pp 1 × dp 2",
                "parallel.recompute = full": "tp 1 × pp 1 × dp 4",
                "32 such ranks": "tp 1 × pp 1 × dp 32",
            },
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(count, gib, overrides, remedies):
    problem, *lines = refusal(gpus(count, gib), *overrides).splitlines()
    assert problem.endswith(f"on its fullest stage, and a GPU has {gib:.1f} GiB. What would fit:")
    found = [re.fullmatch(r"  (.+): ([\d.]+) GiB with (.+)", line).groups() for line in lines]
    assert {name: grid for name, _, grid in found} == remedies
    assert all(float(needed) <= 0.9 * gib for _, needed, _ in found)


def test_a_remedy_is_what_the_change_gives():
    ranks = gpus(8, 60)
    changed = config_of(*AS_ASKED, "--parallel.recompute", "full")
    needed = estimate_fullest(changed, Layout(dp=8), torch.bfloat16, "cuda").total / GIB
    assert f"parallel.recompute = full: {needed:.1f} GiB" in refusal(ranks, *AS_ASKED)
    require_fit(changed, choose_layout(changed, ranks)[0], ranks)


def test_where_nothing_fits_the_least_is_taken():
    ranks, config = gpus(16, 8), config_of()
    sizes = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8, 16) if tp * pp <= 16]
    layouts = [Layout(tp=tp, pp=pp, dp=16 // (tp * pp)) for tp, pp in sizes]
    least = min(layouts, key=lambda layout: estimate_fullest(config, layout, torch.bfloat16, "cuda").total)
    layout, reason = choose_layout(config, ranks)
    assert layout == least
    assert "none fits in 90% of 8.0 GiB" in reason and "Safer" not in reason


def test_a_fit_that_is_tight_is_taken_and_said():
    ranks = gpus(1, 139.8)
    layout, reason = choose_layout(config_of(), ranks)
    require_fit(config_of(), layout, ranks)
    assert reason.startswith("tp and pp auto: none fits in 90% of 139.8 GiB; this one needs least, 13")
    assert "GiB, and may run out. Safer: parallel.recompute = full: 11" in reason


@pytest.mark.parametrize("gib", [4, 24])
def test_a_laptop_is_told_of_smaller_models_and_not_of_more_ranks(gib):
    """At 24 GiB for each of 16 ranks the model would fit, but this machine's memory is shared by all of them."""
    text = refusal(ClusterSpec(2, 2, gib * GIB, "cpu", torch.float32))
    assert f"each of 2 rank(s) on this machine has {gib}.0 GiB" in text
    assert text.splitlines()[1:] == ["  model.preset = tiny, to try the engine on a small machine"]


def test_a_cpu_that_may_run_out_of_memory_and_has_no_remedy():
    config = config_of("--parallel.recompute", "full", "--optimizer.moments", "bf16")
    needed = estimate_fullest(config, Layout(), torch.float32, "cpu").total
    _, reason = choose_layout(config, ClusterSpec(1, 1, needed, "cpu", torch.float32))
    assert reason.endswith("GiB, and may run out")

"""What is computed from results: the tables, the bound of a step, and changes; on those of the first run on a GPU."""

import json
import shutil
from pathlib import Path

import pytest

from engine.config.schema import ModelConfig
from engine.errors import ConfigError
from engine.model.families import PRESETS
from tools.bench.gpu import bound, compare, report
from tools.bench.gpu.bound import FORWARD, WEIGHTS, Work
from tools.bench.gpu.stages import ROOT, whole_steps
from tools.bench.kernel_table import BEGIN, END
from tools.bench.results import load, save

FIRST_RUN = ROOT / "tools" / "bench" / "results" / "h200-6f2f60f"
LIMITS = {"bf16": 700.0, "delayed": 1300.0, "copy": 4.0, "attention, forward": 400.0, "attention, backward": 350.0}
SIZES = {"model": ModelConfig(**PRESETS["llama2-7b"]), "tokens": 32_768, "seq_length": 4096, "microbatches": 8}


def work(precision: str = "bf16", bf16_moments: bool = False, **changes) -> Work:
    return Work(**SIZES | changes, precision=precision, bf16_moments=bf16_moments)


@pytest.fixture
def run(tmp_path):
    """A copy of the results of the first run."""
    return Path(shutil.copytree(FIRST_RUN, tmp_path / "run"))


def test_the_bound_of_a_7b_by_hand():
    seconds = bound.bound(work(), LIMITS)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert seconds[FORWARD] == pytest.approx(4 * 32_768 * parameters / 700e12)
    assert seconds[WEIGHTS] == pytest.approx(2 * 32_768 * parameters / 700e12)
    assert seconds["attention, forward"] == pytest.approx(32 * 2 * 8 * 4096**2 * 4096 / 400e12)
    assert seconds["attention, backward"] == pytest.approx(32 * 5 * 8 * 4096**2 * 4096 / 350e12)
    assert seconds["SwiGLU backward"] == pytest.approx(32 * 5 * 2 * 32_768 * 11008 / 4e12)
    assert seconds["AdamW"] == pytest.approx(30 * 6_738_149_376 / 4e12, rel=1e-3)
    assert "quantize" not in seconds


def test_the_bound_in_fp8_keeps_the_head_in_bf16_and_quantizes():
    in_bf16, in_fp8 = (bound.bound(work(precision, True), LIMITS) for precision in ("bf16", "delayed"))
    head = 4 * 32_768 * 4096 * 32000 / 700e12
    assert in_fp8[FORWARD] - head == pytest.approx((in_bf16[FORWARD] - head) * 700 / 1300)
    assert in_fp8["quantize"] > 0
    assert in_fp8["AdamW"] == pytest.approx(22 / 30 * bound.bound(work(), LIMITS)["AdamW"])


def test_small_microbatches_are_bound_by_the_accumulated_gradients():
    many = bound.bound(work(tokens=8 * 64, seq_length=64), LIMITS)
    assert many[WEIGHTS] == pytest.approx(8 * 8 * (work().layers + work().head) / 4e12)


def test_limits_are_the_longest_runs_and_the_fastest_attention(run):
    rows = compare.rows_of(compare.read(run))
    profile = rows["llama2-7b delayed, whole step, profile"]
    bf16 = rows["llama2-7b bf16, whole step, profile"]
    limits, origin = bound.limits_of(rows, work("delayed"), profile, bf16)
    assert limits["bf16"] == pytest.approx(668, abs=1)  # what the profiles reached
    assert limits["delayed"] == pytest.approx(1264, abs=1)
    assert limits["attention, backward"] == pytest.approx(380, abs=1)
    assert limits["copy"] == pytest.approx(4.28, abs=0.01)
    assert origin == "attention, backward; attention, forward; bf16; delayed: as in this profile"
    for seconds, value in ((0.08, 790.0), (2.1, 672.0)):
        rows[f"bf16 matmul 8192³, {seconds} s"] = {"value": value, "seconds": seconds, "calls": 9}
    rows["FP8 tensorwise matmul 8192³, 2 s"] = {"value": 1265.0, "seconds": 2.0, "calls": 9}
    rows["attention sdpa, 1"] = {"forward_tflops": 440.0, "backward_tflops": 360.0}
    rows["attention flash_attn, 1"] = {"forward_tflops": 430.0, "backward_tflops": 400.0}
    limits, origin = bound.limits_of(rows, work("delayed"), profile, bf16)
    assert origin == "all measured in this run"
    assert [limits[name] for name in ("bf16", "delayed", "attention, forward", "attention, backward")] == [
        672, 1265, 440, 400
    ]  # fmt: skip


def test_the_page_of_the_first_run(run, capsys):
    target = run.parent / "doc.md"
    target.write_text(f"{BEGIN}\n{END}\nbetween\n{report.BEGIN_STEPS}\n{report.END_STEPS}\n", encoding="utf-8")
    report.main(["--results", str(run), "--into", str(target)])
    text = target.read_text(encoding="utf-8")
    settings = "--batch.global 8 --precision.recipe delayed --optimizer.moments bf16"
    measured = "**17,512** | 17,434 – 17,610 | 21,682 | 75.9% | 117 | | | 1.71× / 1.66× / 1.41×"
    assert f"| delayed | {settings} | 20,500 | {measured} |" in text
    assert "| bf16, two | | 14,000 | not run | | | | | | | |" in text
    assert "| matmuls, forward and input gradient | 1,263.3 | 2,064 | 1,296.0 |" in text
    assert "| **all** | **2,515** | **12,562** | **2,414** |" in text
    assert "| bursts, attention, FP8 algorithms, hidden communication, time on the host | not run | | |" in text
    assert "| RMSNorm forward | 8192×4096 bf16 | 39 | 34.7 | 31.2 µs | **41.4** |" in text
    assert text.count("`bash tools/bench/gpu.sh` (NVIDIA H200, torch 2.11.0+cu130, 6f2f60f).") == 2
    assert "\nbetween\n" in text
    assert not (run / "report.md").exists()
    report.main(["--results", str(run), "--into", str(target)])
    assert target.read_text(encoding="utf-8") == text  # the second time changes nothing
    report.main(["--results", str(run)])
    assert (run / "report.md").read_text(encoding="utf-8").count("| **all** |") == 4


def test_what_has_not_run_says_why(run):
    stage = {"status": "not run", "problem": "no liger: not installed"}
    save(run / "step-transformers-liger.json", {"machine": {}, "rows": {}, "stage": stage})
    (run / "step-bf16.json").unlink()
    section = report.steps_section(compare.read(run), "llama2-7b")
    assert "| transformers-liger | | | not run: no liger: not installed | | | | | | | |" in section
    assert "| bf16 | | 13,600 | not run |" in section
    assert "| quantize | 78.0 | 1,408 | not run |" in section  # no rate of bf16, no bound
    assert "| | | 1.71× / 1.66× / – |" in section  # nothing to compare with


def test_clocks_watts_and_bursts_are_shown(run):
    document = load(run / "step-bf16.json")
    power = {"sm_mhz": [1200, 1455, 1980], "watts": [300, 699.6, 701], "celsius": [50, 60, 65], "samples": 90}
    document["rows"]["llama2-7b bf16, whole step"]["power"] = power
    save(run / "step-bf16.json", document)
    row = {"value": 671.23, "unit": "TFLOP/s", "calls": 1200, "seconds": 2.0, "power": power}
    save(run / "sustained.json", {"machine": {}, "rows": {"bf16 matmul 8192³, 2 s": row}})
    section = report.steps_section(compare.read(run), "llama2-7b")
    assert "| 132 | 1,455 | 700 | 1.26× / 1.23× / 1.05× |" in section
    assert "| bf16 matmul 8192³, 2 s | 671.2 TFLOP/s | 1,455 | 700 |" in section


def test_changes_name_what_is_better_worse_new_gone_and_within_noise(run):
    before = compare.read(FIRST_RUN)
    document = load(run / "step-bf16.json")
    step, profile = document["rows"].values()
    step["value"] *= 1.05
    profile["busy"] = 0.9
    adamw = next(name for name in profile["kernels"] if "adamw" in name)
    profile["kernels"][adamw][0] -= 10_000
    kernels = load(run / "kernels.json")
    kernels["rows"]["AdamW"]["seconds"] *= 1.2
    kernels["rows"]["gradient norm"]["seconds"] *= 1.01
    del kernels["rows"]["RoPE on q and k"]
    save(run / "step-bf16.json", document)
    save(run / "kernels.json", kernels)
    lines = list(compare.changes(before, compare.read(run)))
    assert lines[:4] == [
        "WORSE   +20.0%  AdamW: 51,184 -> 61,421 µs",
        "better   +5.0%  llama2-7b bf16, whole step: 12,950 -> 13,598 tokens/s",
        "WORSE  +1134.2%  llama2-7b bf16, whole step, profile of 32,768 tokens, idle: 20.38 -> 251.5 ms",
        "better  -19.4%  llama2-7b bf16, whole step, profile of 32,768 tokens, AdamW: 51.58 -> 41.58 ms",
    ]
    assert lines[4] == "102 of 106 figures have changed by less than 2%"
    assert lines[5] == "1 figures were not measured now: RoPE on q and k"


def test_another_card_is_named():
    runs = [{"a": {"machine": {"gpu": gpu}, "rows": {}}} for gpu in ("NVIDIA H200", "NVIDIA H100")]
    assert next(compare.changes(*runs)) == "not the same card: NVIDIA H200 -> NVIDIA H100"
    assert "card" not in next(compare.changes(runs[0], runs[0]))


def test_tests_that_end_otherwise_than_before(tmp_path):
    outcomes = (
        {"a": "passed", "b": "failed", "c": "passed"},
        {"a": "failed", "b": "passed", "c": "passed", "d": "failed"},
    )
    runs = [{"tests": {"machine": {}, "rows": {n: {"outcome": o} for n, o in rows.items()}}} for rows in outcomes]
    lines = list(compare.changes(*runs))
    assert lines[1:] == ["a: passed -> failed", "b: failed -> passed"]


def test_a_path_without_results(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match="expected a folder of results"):
            compare.read(path)


def test_the_documents_have_what_the_first_run_measured():
    """docs/measurements.md has the section that the program writes of the latest committed results, or a later one."""
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    between = text.partition(report.BEGIN_STEPS)[2].partition(report.END_STEPS)[0]
    for step in whole_steps():
        assert f"\n| {step.name} | " in between
    if "6f2f60f" in between:
        assert between == f"\n{report.steps_section(compare.read(FIRST_RUN), 'llama2-7b')}\n"


def test_the_first_run_is_as_it_was_reported():
    rows = compare.rows_of(compare.read(FIRST_RUN))
    expected = {"bf16": 12_950, "tensorwise": 16_371, "delayed": 17_512, "blockwise": 15_420}
    expected |= {"transformers": 10_239, "transformers-compiled": 10_540, "transformers-liger": 12_382}
    assert {name: round(rows[f"llama2-7b {name}, whole step"]["value"]) for name in expected} == expected
    assert all(json.dumps(row) for row in rows.values())

"""Whole steps, at a size where only their working can be judged."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from engine.errors import ConfigError
from tools.bench import whole_step

SMALL = ["--device", "cpu", "--preset", "tiny", "--batch", "4", "--seq-length", "48", "--rounds", "3"]


def run(tmp_path, *flags: str) -> dict:
    path = tmp_path / "step.json"
    whole_step.main([*SMALL, *flags, "--json", str(path), "--commit", "abc"])
    return json.loads(path.read_text(encoding="utf-8"))


def test_ours_with_a_profile(tmp_path, capsys):
    flags = ("--precision", "fp8", "--model.intermediate_size", "192", "--batch.micro", "2", "--profile")
    document = run(tmp_path, *flags)
    assert document["machine"] == {"gpu": "no GPU", "torch": torch.__version__, "commit": "abc"}
    assert list(document["rows"]) == ["tiny fp8, whole step", "tiny fp8, whole step, profile"]
    result, profile = document["rows"].values()
    assert result["range"][0] <= result["value"] <= result["range"][1]
    assert result["value"] * result["step_s"] == pytest.approx(result["tokens"]) == 4 * 48
    assert (result["mfu"], result["peak_gib"], result["power"]) == (None, None, {})
    assert result["settings"] == "--model.intermediate_size 192 --batch.micro 2"
    assert profile["tokens"] == 4 * 48
    printed = capsys.readouterr().out
    assert printed.count("loss 5.") == 5  # two to warm up
    assert "causal attention" in printed
    with pytest.raises(ConfigError, match="no_such_setting"):
        run(tmp_path, "--model.no_such_setting", "1")


def losses(printed: str) -> list[float]:
    return [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]


def test_theirs_learns_the_same_tokens(tmp_path, capsys):
    """Other weights and other rounding: losses start near ln(256), and fall as ours do on repeated tokens."""
    run(tmp_path)
    ours = losses(capsys.readouterr().out)
    document = run(tmp_path, "--impl", "transformers", "--name", "theirs")
    theirs = losses(capsys.readouterr().out)
    assert document["rows"]["theirs"]["impl"] == "transformers"
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert theirs[-1] < theirs[0]
    assert ours[0] - ours[-1] == pytest.approx(theirs[0] - theirs[-1], rel=0.2)


def test_theirs_with_liger_applies_its_kernels_before_the_model_is_made(tmp_path, monkeypatch):
    applied = []
    package = ModuleType("liger_kernel")
    package.transformers = SimpleNamespace(apply_liger_kernel_to_llama=lambda: applied.append(True))
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    run(tmp_path, "--impl", "transformers-liger", "--rounds", "1")
    assert applied == [True]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ConfigError, match="--impl transformers-liger needs transformers, and liger-kernel"):
        run(tmp_path, "--impl", "transformers-liger")


def test_documents_are_masked_and_have_the_length_that_was_asked_for():
    options = whole_step._arguments(["--device", "cpu", "--preset", "tiny", "--documents", "1000", "--batch", "64"])
    config = whole_step.configure(options)
    assert config.data.document_mask
    batches = whole_step.random_microbatches(config, options.documents)
    lengths = [b - a for batch in batches for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
    assert sum(lengths) == 64 * 4096
    assert 700 < sum(lengths) / len(lengths) < 1000  # the last of a sequence is cut
    whole = whole_step.random_microbatches(config, None)
    assert all(batch.cu_seqlens == (0, 4096) for batch in whole)


def test_figures_of_a_7b():
    """42.86 GFLOP a token: half of the pairs of a causal attention are counted."""
    config = whole_step.configure(whole_step._arguments(["--device", "cpu"]))
    assert config.batch.global_ * config.data.seq_length == 65_536
    assert config.precision.mode == "bf16"
    result = whole_step.summary(config, [5.0, 4.0, 8.0], 1 << 30, 989.0)
    assert result["value"] == pytest.approx(13_107.2)
    assert result["range"] == [8192, 16384]
    assert result["step_s"] == 5.0
    assert result["peak_gib"] == 1
    assert result["mfu"] == pytest.approx(13_107.2 * 42.86e9 / 989e12, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected 1"),
        (["--documents", "0"], "--documents 0: expected 1"),
        (["--impl", "transformers", "--documents", "9"], "--impl transformers trains in bf16"),
        (["--impl", "transformers", "--preset", "tiny-qwen2"], "expected a Llama"),
        (["--device", "cuda"], "torch finds no GPU"),
    ],
)
def test_what_cannot_be_measured(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *flags)

"""The benchmark of the training step, at a size where only its working can be judged."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, TriaxisError

PROGRAM = Path(__file__).parents[3] / "tools" / "bench" / "step.py"


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("bench_step", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(monkeypatch):
    base = ["step.py", "--vocab-size", "70", "--threads", "1", "--rounds", "1", "--batch", "2", "--seq-length", "24"]
    monkeypatch.setattr(sys, "argv", [*base, "--preset", "tiny"])
    return sys.argv


def test_compares_and_splits(program, arguments, capsys):
    program.main()
    printed = capsys.readouterr().out
    assert "vocabulary 70, 1 thread(s), 48 tokens a step, first loss 4." in printed
    for name in ("triaxis  ", "transformers, sdpa", "transformers, eager", "matmuls", "attention", "optimizer"):
        assert name in printed
    assert "triaxis is 1.00×" in printed


def test_refuses_sides_that_do_different_work(program, arguments, monkeypatch):
    monkeypatch.setattr(program, "_transformers", lambda *_: lambda: 3.0)
    with pytest.raises(TriaxisError, match="different losses"):
        program.main()


def test_an_unknown_preset_names_those_that_work(program, arguments):
    arguments[-1] = "tinny"
    with pytest.raises(ConfigError, match=r"llama2-7b.*tiny"):
        program.main()


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--heads", "3"], ["--threads", "0"]])
def test_numbers_that_cannot_be(program, arguments, flags):
    arguments.extend(flags)
    with pytest.raises(ConfigError, match=f"{flags[0]} {flags[1]}: "):
        program.main()


def test_what_only_a_gpu_measures(program, arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags in (["--precision", "fp8"], ["--json", "x.json"], ["--parallel.recompute", "full"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *flags])
        with pytest.raises(ConfigError, match=f"{flags[0]}: only for a step on a GPU"):
            program.main()


@pytest.fixture
def on_gpu(program, monkeypatch, tmp_path):
    """The CPU stands for a GPU; returns what a call with these flags writes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"synchronize": None, "max_memory_allocated": 3 << 30, "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    init_distributed = program.init_distributed
    monkeypatch.setattr(program, "init_distributed", lambda device: init_distributed("cpu"))

    def run(*flags: str) -> dict:
        path = tmp_path / "step.json"
        small = ["--batch", "2", "--seq-length", "32", "--rounds", "3"]
        monkeypatch.setattr(sys, "argv", ["step.py", "--preset", "tiny", *small, *flags, "--json", str(path)])
        program.main()
        return json.loads(path.read_text(encoding="utf-8"))

    return run


def test_a_step_on_a_gpu(on_gpu, capsys):
    document = on_gpu("--precision", "fp8", "--model.intermediate_size", "192", "--commit", "abc")
    assert document["machine"] == {"gpu": "a GPU", "torch": torch.__version__, "commit": "abc"}
    (result,) = document["rows"].values()
    assert list(document["rows"]) == ["tiny fp8, whole step"]
    assert result["range"][0] <= result["value"] <= result["range"][1]
    assert result["mfu"] is None
    assert result["peak_gib"] == 3
    assert result["settings"] == "--model.intermediate_size 192"
    printed = capsys.readouterr().out
    assert printed.count("loss 5.") == 5  # two to warm up
    assert "causal attention" in printed
    with pytest.raises(ConfigError, match="no_such_setting"):
        on_gpu("--model.no_such_setting", "1")


def test_figures_of_a_7b(program, monkeypatch):
    """42.86 GFLOP a token: half of the pairs of a causal attention are counted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["step.py", "--preset", "llama2-7b"])
    args = program._arguments()
    config = program.gpu_config(args)
    assert config.batch.global_ * config.data.seq_length == 65_536
    assert config.precision.mode == "bf16"
    result = program.summary(config, [5.0, 4.0, 8.0], 1 << 30, 989.0)
    assert result["value"] == pytest.approx(13_107.2)
    assert result["range"] == [8192, 16384]
    assert result["mfu"] == pytest.approx(13_107.2 * 42.86e9 / 989e12, rel=1e-3)

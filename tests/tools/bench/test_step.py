"""The benchmark of the training step, at a size where only its working can be judged."""

import importlib.util
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

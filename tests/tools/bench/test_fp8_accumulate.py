"""The proof of the accumulating FP8 matmul: it passes on the host, and finds and explains an error."""

import pytest
import torch

from engine.errors import ConfigError
from engine.ops.quantize import QuantizedTensor
from tests.csrc.conftest import emulated, emulated_library, toolchain  # noqa: F401
from tools.bench import fp8_accumulate
from tools.bench.fp8_accumulate import STAGES, add_matmul, main

SMALL = ["--runs", "3", "--shape", "48", "144", "896"]


@pytest.fixture
def on_the_host(emulated, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fp8_accumulate, "DEVICE", "cpu")
    monkeypatch.setattr(fp8_accumulate, "require_kernels", lambda: None)


def test_nothing_differs(on_the_host, capsys):
    assert main(SMALL) == 0
    printed = capsys.readouterr().out
    assert printed.count("differ in 0 elements") == printed.count("0 of 3 runs differ") == 2
    assert printed.endswith("right, bit for bit\n")


def test_a_scale_that_was_overwritten_is_found_and_explained(on_the_host, monkeypatch, capsys):
    """In the second run of each scaling, one row of A gets the scale of the block that the ring copies next."""
    calls, factors = [], []

    def add(out: torch.Tensor, a: QuantizedTensor, b: QuantizedTensor) -> None:
        calls.append(b.scaling)
        scales = a.scale_inv.clone()
        if len(calls) % 3 == 2:
            scales[1, 27] = scales[1 + STAGES, 27]
            factors.append(float(scales[1, 27] / a.scale_inv[1, 27]) - 1)
        add_matmul(out, QuantizedTensor(a.values, scales, a.scaling), b)

    monkeypatch.setattr(fp8_accumulate, "add_matmul", add)
    assert main(SMALL) == 1
    printed = capsys.readouterr().out
    assert printed.count("1 of 3 runs differ") == 2
    assert printed.count("144 elements, in 2 tiles of a warp") == 2
    assert printed.count("by half of 16 rows: {1: 144}") == 2
    assert all(factors)
    for factor in factors:
        found = f"row 27, columns from 0: block 1 (cosine 1.0000) times {factor:+.4g}; the scale of A of block 6 would"
        assert found in printed
        assert f"block 6 would make it {factor:+.4g}\n" in printed
    assert "WRONG" in printed


def test_matmuls_that_differ_from_each_other_are_found(on_the_host, monkeypatch, capsys):
    monkeypatch.setattr(fp8_accumulate, "matmul", lambda a, b: torch.randn(48, 144))
    assert main(SMALL) == 1
    assert "do not add differ in 6912 elements" in capsys.readouterr().out


def test_arguments(monkeypatch):
    with pytest.raises(ConfigError, match="--runs 0: expected 1 or more"):
        main(["--runs", "0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds none"):
        main([])

"""What a device sustains, on the host."""

import json

import pytest

from tools.bench import sustained

SMALL = ["--device", "cpu", "--size", "128", "--seconds", "0.001", "0.003"]


def test_every_workload_runs_for_each_duration(tmp_path):
    path = tmp_path / "a.json"
    assert sustained.main([*SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = ("bf16 matmul 128³", "FP8 tensorwise matmul 128³", "FP8 blockwise matmul 128³", "device copy")
    assert list(rows) == [f"{name}, {seconds} s" for name in names for seconds in ("0.001", "0.003")]
    row = rows["bf16 matmul 128³, 0.001 s"]
    assert row["value"] * row["seconds"] == pytest.approx(row["calls"] * 2 * 128**3 / 1e12)
    row = rows["device copy, 0.003 s"]
    assert row["value"] * row["seconds"] == pytest.approx(row["calls"] * 2 * 2 * 128**2 / 1e12)
    assert {row["unit"] for row in rows.values()} == {"TFLOP/s", "TB/s"}


def test_a_workload_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(sustained, "scaled_matmul", fails)
    path = tmp_path / "a.json"
    assert sustained.main([*SMALL, "--json", str(path)]) == 1
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert rows["FP8 blockwise matmul 128³, sustained"] == {"error": "RuntimeError: no"}
    assert len(rows) == 6

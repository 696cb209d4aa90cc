"""The comparison of attention implementations, on the host."""

import json

import pytest
import torch

from tools.bench import attention

SMALL = ["--device", "cpu", "--tokens", "64", "--heads", "2"]


def test_what_runs_here_is_checked_and_timed_and_the_rest_is_named(tmp_path):
    path = tmp_path / "a.json"
    assert attention.main([*SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for case in ("1 × 64", "2 × 64", "documents of 16"):
        row = rows[f"attention sdpa, {case}"]
        assert row["value"] == pytest.approx(1e3 * (row["forward_s"] + row["backward_s"]))
        assert "needs a GPU" in rows[f"attention varlen, {case}"]["skipped"]
    row = rows["attention sdpa, 2 × 64"]
    assert row["forward_tflops"] * row["forward_s"] == pytest.approx(2 * 2 * 64**2 * 2 * 128 / 1e12)


def test_a_wrong_implementation_is_an_error(monkeypatch):
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, k, v, cuts, impl: right(q, k, v, (0, cuts[-1]), impl=impl))
    assert "seconds" not in (found := attention.measure("sdpa", (0, 20, 64), 2, "cpu"))
    assert found["error"].startswith("ValueError: wrong: result 0 is off")
    monkeypatch.setattr(
        attention, "attention", lambda q, k, v, cuts, impl: right(q, k, v.detach(), cuts, impl=impl) + v * 0
    )
    assert "result 3 is off" in attention.measure("sdpa", (0, 64), 2, "cpu")["error"]


def test_documents_cover_all_tokens_with_the_mean_that_they_name():
    cuts = dict(attention.cases(4096))["documents of 1,000"]
    assert cuts[0] == 0
    assert cuts[-1] == 4096
    assert sorted(set(cuts)) == list(cuts)
    assert 3 <= len(cuts) - 1 <= 8
    assert torch.tensor(cuts).diff().min() > 0

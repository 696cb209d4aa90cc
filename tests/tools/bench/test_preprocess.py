"""The bench runs, compares ids, and fails when they differ."""

import importlib.util
from pathlib import Path

import pytest

from engine.data.tokenizers import fast_sentencepiece
from engine.errors import ConfigError, DataError
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece

PROGRAM = Path(__file__).parents[3] / "tools" / "bench" / "preprocess.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_preprocess", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUICK_BYTES", 300_000)
    return module


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(standard_library_texts(50_000), vocab_size=500))
    return path


def test_table(bench, model, capsys, tmp_path):
    bench.main(["--quick", "--tokenizer-model", str(model)])
    out = capsys.readouterr().out
    for part in ("a.model: 500 pieces", "first pass", "second pass", "ids identical on all", "skipped with --quick"):
        assert part in out
    bench._whole_tool(tmp_path, model, ["a text"] * 10)
    assert "--encoder auto --workers 2" in capsys.readouterr().out


def test_other_ids_are_a_failure(bench, model, monkeypatch):
    monkeypatch.setattr(fast_sentencepiece.FastSentencePiece, "_self_test", lambda self, pieces: None)
    right = fast_sentencepiece.merges
    monkeypatch.setattr(fast_sentencepiece, "merges", lambda scores: right(scores)[::-1])
    with pytest.raises(DataError, match="ids differ"):
        bench.main(["--quick", "--tokenizer-model", str(model)])


def test_without_the_package_that_holds_the_model(bench, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "standard_library_texts", lambda limit: ["a"])
    with pytest.raises(ConfigError, match="pip install --no-deps mistral-common"):
        bench.main([])

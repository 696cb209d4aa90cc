"""What `verify` finds equal, different, and what it cannot compare."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoint.huggingface import exported_ids, verifying
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.huggingface.verifying import as_json, verify
from engine.checkpoint.reader import Checkpoint
from engine.config.schema import ModelConfig
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from tests.checkpoint.huggingface.directory_cases import TINY, edit_weights, export_, tiny_checkpoint
from tests.checkpoint.huggingface.test_exported_ids import MODEL, run_with_tokenizer

EQUAL = dict.fromkeys(("tensors", "logits", "token ids", "generation"), "equal")


def results(checkpoint: Checkpoint, path: Path) -> dict[str, str]:
    return {check.name: check.result for check in verify(checkpoint, path, logical_shapes(checkpoint.model))}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Checkpoint, Path]:
    """A run with a tokenizer and a chat template, and its export."""
    pytest.importorskip("transformers")
    run, tokenizer = run_with_tokenizer(tmp_path, "qwen")
    return run, export(run, tokenizer, tmp_path / "out", logical_shapes(MODEL))


def test_an_export_and_an_import_are_equal(exported: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    run, out = exported
    checks = verify(run, out, logical_shapes(MODEL))
    assert {check.name: check.result for check in checks} == EQUAL
    details = [check.detail for check in checks]
    assert details[0] == f"{len(logical_shapes(MODEL))} tensors, bitwise in bfloat16"
    assert "256 tokens, fp32" in details[1] and "3 conversations, read by triaxis and transformers" in details[2]
    report = as_json(run, out, checks)
    assert report["checks"]["tensors"] == {"result": "equal", "detail": details[0]}
    assert report["versions"].keys() == {"triaxis", "torch", "transformers"}
    # the source of the import names no end of generation
    assert results(run, tmp_path / "hf") == EQUAL | {"generation": "not compared"}


def swap_two_tokens(out: Path) -> None:
    content = json.loads((out / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (out / "tokenizer.json").write_text(json.dumps(content))


def other_template(out: Path) -> None:
    path = out / "chat_template.jinja"
    path.write_text(path.read_text().replace("'\\n'", "' '"))


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda out: edit_weights(out, lambda weights: weights["model.norm.weight"][:1].mul_(-1)), "tensors"),
    (lambda out: edit_weights(out, lambda weights: weights["lm_head.weight"][3, 3:4].fill_(0.5)), "tensors"),
    (lambda out: edit(out / "config.json", rope_theta=10001.0), "tensors"),
    (swap_two_tokens, "token ids"),
    (other_template, "token ids"),
    (lambda out: edit(out / "generation_config.json", eos_token_id=3), "generation"),
    (lambda out: edit(out / "generation_config.json", eos_token_id=[2, 3]), "generation"),
    (lambda out: edit(out / "generation_config.json", max_new_tokens="many"), "logits, generation"),
]


@pytest.mark.parametrize(("fault", "names"), FAULTS)
def test_what_differs_is_named(exported: tuple[Checkpoint, Path], fault: Callable[[Path], object], names: str) -> None:
    run, out = exported
    fault(out)
    assert results(run, out) == EQUAL | dict.fromkeys(names.split(", "), "different")


def test_an_end_that_the_directory_does_not_have_is_a_difference(
    exported: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "stop_ids", lambda tokenizer: frozenset({tokenizer.eod_id, 3}))
    assert results(*exported) == EQUAL | {"generation": "different"}


@pytest.mark.parametrize("preset", ["tiny-mistral", "tiny-starcoder2"])
def test_another_function_of_the_same_weights_is_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    pytest.importorskip("transformers")
    model = ModelConfig(**{**PRESETS[preset], "num_layers": 2})
    run = tiny_checkpoint(tmp_path / "run", model)
    out = export_(run, tmp_path / "out")
    assert results(run, out)["logits"] == "equal"
    build = verifying.build_decoder

    def with_wider_window(directory: verifying.HuggingFaceDirectory, *rest: object) -> object:
        directory.model = model.model_copy(update={"sliding_window": 33})
        return build(directory, *rest)

    monkeypatch.setattr(verifying, "build_decoder", with_wider_window)
    assert results(run, out) == EQUAL | {
        "logits": "different", "token ids": "not compared", "generation": "not compared"
    }  # fmt: skip


def test_what_cannot_be_compared_is_not_called_equal(
    exported: tuple[Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = exported
    monkeypatch.setattr(verifying, "_available_bytes", lambda: 1000.0)
    (logits,) = [check for check in verify(run, out, logical_shapes(MODEL)) if check.name == "logits"]
    assert logits.result == "not compared" and "GB of memory" in logits.detail
    monkeypatch.setattr(verifying, "find_spec", lambda name: None)
    monkeypatch.setattr(exported_ids, "readers", lambda: ["triaxis"])
    checks = {check.name: check for check in verify(run, out, logical_shapes(MODEL))}
    assert checks["logits"].detail.startswith("transformers is not installed")
    assert checks["token ids"].detail.endswith("0 conversations, read by triaxis")
    monkeypatch.setattr(exported_ids, "find_spec", lambda name: None)
    assert results(run, out)["token ids"] == "not compared"
    bare = tiny_checkpoint(tmp_path / "bare", TINY)
    assert results(bare, export_(bare, tmp_path / "weights")) == {
        "tensors": "equal", "logits": "not compared", "token ids": "not compared", "generation": "not compared"
    }  # fmt: skip

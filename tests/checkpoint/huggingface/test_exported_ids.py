"""Ids of an export are those of training, as `transformers` and this package read it."""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.huggingface import exported_ids, exporting
from engine.checkpoint.huggingface.exported_ids import require_trained_ids
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.huggingface.tokenizer_files import sentencepiece_tokenizer
from engine.checkpoint.reader import Checkpoint
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.find import find_template
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError
from engine.model.parameters import logical_shapes
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece, write_chatml_tokenizer
from tests.checkpoint.huggingface.directory_cases import TINY, export_, import_, tiny_checkpoint

INST = """{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"""
CHATML = (
    """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"""
)
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None, "add_prefix_space": False}
CHAT = [{"role": "user", "content": "how far"}, {"role": "assistant", "content": "nine  miles"}]
# kind of model, whether a tokenizer.json stands beside it, tokenizer_config.json, chat template
DIRECTORIES: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "llama 2": ("plain", True, LLAMA | {"legacy": False}, INST),
    "llama 2, legacy": ("plain", True, LLAMA | {"legacy": True}, INST),
    "llama 2, without a class": ("plain", True, {"eos_token": "</s>"}, INST),
    "llama 2, the model alone": ("plain", False, LLAMA, INST),
    "mistral v3": ("symbols", False, LLAMA | {"legacy": False}, INST),
    "qwen": ("bytes", True, QWEN, CHATML),
    "split": ("bytes", True, QWEN | {"split_special_tokens": True}, CHATML),
}
MODEL = TINY.model_copy(update={"vocab_size": 400})


def run_with_tokenizer(path: Path, name: str) -> tuple[Checkpoint, Tokenizer]:
    """A run imported from a directory with this tokenizer, which is also that of training."""
    kind, has_json, config, template = DIRECTORIES[name]
    hf = export_(tiny_checkpoint(path / "first", MODEL), path / "hf")
    if kind == "bytes":
        write_chatml_tokenizer(hf)
    else:
        symbols = ["[INST]", "[/INST]"] if kind == "symbols" else []
        model = train_sentencepiece(standard_library_texts(20_000), vocab_size=400, control_symbols=symbols)
        (hf / "tokenizer.model").write_bytes(model)
        if has_json:
            (hf / "tokenizer.json").write_text(json.dumps(sentencepiece_tokenizer(model)[0]))
    (hf / "tokenizer_config.json").write_text(json.dumps(config))
    (hf / "chat_template.jinja").write_text(template)
    run = import_(hf, path / "run")
    assert run.tokenizer_spec is not None
    return run, load_tokenizer(run.tokenizer_spec, fast=False)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_an_export_gives_the_ids_of_training(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    run, tokenizer = run_with_tokenizer(tmp_path, name)
    out = export(run, tokenizer, tmp_path / "out", logical_shapes(MODEL))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    trained = ChatEncoder(tokenizer, find_template(tokenizer)).encode(CHAT)[0].tolist()
    assert theirs.apply_chat_template(CHAT, return_dict=False) == trained
    assert theirs.encode(" a  b\n", add_special_tokens=False) == list(tokenizer.encode(" a  b\n"))
    config = json.loads((out / "config.json").read_text())
    assert theirs.eos_token_id == config["eos_token_id"] == tokenizer.eod_id
    assert theirs.pad_token_id == config["pad_token_id"]


def other_class(files: Any, target: Path, directory: Path, tokenizer: Tokenizer) -> None:
    exporting_write(files, target, directory, tokenizer)
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(config | LLAMA | {"legacy": False}))


def other_ids(files: Any, target: Path, directory: Path, tokenizer: Tokenizer) -> None:
    exporting_write(files, target, directory, tokenizer)
    content = json.loads((target / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (target / "tokenizer.json").write_text(json.dumps(content))


def other_template(files: Any, target: Path, directory: Path, tokenizer: Tokenizer) -> None:
    exporting_write(files, target, directory, tokenizer)
    (target / "chat_template.jinja").write_text(INST.replace("[INST] ", "[INST]"))


exporting_write = exporting.write_tokenizer
FAULTS = {other_class: r"transformers \(\w+\)", other_ids: "this package", other_template: r"transformers \(\w+\)"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_export_with_other_ids_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    pytest.importorskip("transformers")
    run, tokenizer = run_with_tokenizer(tmp_path, "llama 2")
    monkeypatch.setattr(exporting, "write_tokenizer", fault)
    with pytest.raises(CheckpointError, match=f"read by {FAULTS[fault]}, gives other ids .* --without-tokenizer"):
        export(run, tokenizer, tmp_path / "out", logical_shapes(MODEL))
    assert sorted(os.listdir(tmp_path)) == ["first", "hf", "run"]


def test_extra_special_tokens_are_listed_as_transformers_4_and_5_read_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hf = export_(tiny_checkpoint(tmp_path / "first", MODEL), tmp_path / "hf")
    write_chatml_tokenizer(hf)
    (hf / "tokenizer_config.json").write_text(
        json.dumps(QWEN | {"extra_special_tokens": ["<|im_start|>"], "additional_special_tokens": ["<|im_end|>"]})
    )
    run = import_(hf, tmp_path / "run")
    assert run.tokenizer_spec is not None
    out = export(run, load_tokenizer(run.tokenizer_spec), tmp_path / "out", logical_shapes(MODEL))
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|im_end|>", "<|im_start|>"]
    assert "extra_special_tokens" not in config


def test_a_padding_token_without_a_row_in_the_embedding_is_not_in_the_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = MODEL.model_copy(update={"vocab_size": 256})
    hf = export_(tiny_checkpoint(tmp_path / "first", model), tmp_path / "hf")
    write_chatml_tokenizer(hf)
    content = json.loads((hf / "tokenizer.json").read_text())
    pad = content["added_tokens"][0] | {"id": 259, "content": "[PAD]"}
    (hf / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], pad]}))
    (hf / "tokenizer_config.json").write_text(json.dumps(QWEN | {"pad_token": "[PAD]"}))
    run = import_(hf, tmp_path / "run")
    assert run.tokenizer_spec is not None
    tokenizer = load_tokenizer(run.tokenizer_spec)
    assert tokenizer.special_tokens["[PAD]"] == 259
    out = export(run, tokenizer, tmp_path / "out", logical_shapes(model))
    assert json.loads((out / "config.json").read_text())["pad_token_id"] is None
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_transformers_that_cannot_be_imported_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    run, tokenizer = run_with_tokenizer(tmp_path, "llama 2")
    broken = module_from_spec(ModuleSpec("transformers", None))  # without AutoTokenizer
    monkeypatch.setitem(sys.modules, "transformers", broken)
    with pytest.raises(CheckpointError, match=r"cannot load the tokenizer.*: cannot import .* --without-tokeni"):
        export(run, tokenizer, tmp_path / "out", logical_shapes(MODEL))


def test_without_transformers_this_package_reads_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported_ids, "readers", lambda: ["triaxis"])
    run, tokenizer = run_with_tokenizer(tmp_path, "mistral v3")
    out = export(run, tokenizer, tmp_path / "out", logical_shapes(MODEL))
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text().replace('"first"', '"never"'))
    with pytest.raises(CheckpointError, match="read by this package, gives other ids"):
        require_trained_ids(out, tokenizer)

import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.huggingface.generation_config import stop_ids
from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import CheckpointError
from engine.model.parameters import logical_shapes
from tests.checkpoint.huggingface.directory_cases import TINY, import_, tiny_checkpoint, write_word_tokenizer


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({"top_k": 5}, {"top_k": 5, "eos_token_id": [256, 257]}),
        ({"eos_token_id": 256}, {"eos_token_id": [256, 257]}),
        ({"eos_token_id": [7]}, {"eos_token_id": [7, 257]}),
    ],
)
def test_the_end_of_turn_of_a_chat_template_ends_generation(tmp_path: Path, before: Any, expected: Any) -> None:
    hf = export(
        tiny_checkpoint(tmp_path / "run", tokenizer="byte"), ByteTokenizer(), tmp_path / "hf", logical_shapes(TINY)
    )
    settings = json.loads((hf / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 257, "content": "<end>"})
    (hf / "tokenizer.json").write_text(json.dumps(settings))
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    (hf / "chat_template.jinja").write_text(template)
    (hf / "generation_config.json").write_text(json.dumps(before))
    imported = import_(hf, tmp_path / "imported")
    assert imported.tokenizer_spec
    again = export(imported, load_tokenizer(imported.tokenizer_spec), tmp_path / "again", logical_shapes(TINY))
    assert (again / "chat_template.jinja").read_text() == template
    assert json.loads((again / "generation_config.json").read_text()) == expected


def test_what_ends_a_text(tmp_path):
    directory = write_word_tokenizer(tmp_path)
    tokenizer = load_tokenizer(directory)
    assert stop_ids(ByteTokenizer()) == {256}
    assert stop_ids(tokenizer) == {2}
    for content, ids in (({}, {2}), ({"eos_token_id": None}, {2}), ({"eos_token_id": 0}, {0, 2})):
        (directory / "generation_config.json").write_text(json.dumps(content))
        assert stop_ids(tokenizer) == ids
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert stop_ids(tokenizer) == {0, 1, 2}


NO_END_IDS = ('"x"', "[0, true]", "-1", "3", "1e999", "[[0]]")


@pytest.mark.parametrize("content", ["{", "[]", "3", *(f'{{"eos_token_id": {ids}}}' for ids in NO_END_IDS)])
def test_a_generation_config_that_makes_no_sense(tmp_path, content):
    directory = write_word_tokenizer(tmp_path)
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        stop_ids(load_tokenizer(directory))


IDS = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (IDS, None, IDS),
        (IDS, {"temperature": 0.6, "do_sample": True}, IDS | {"temperature": 0.6, "do_sample": True}),
        (IDS, {"eos_token_id": 5, "pad_token_id": None}, IDS | {"eos_token_id": 5}),
        ({"pad_token_id": -1, "bos_token_id": 10**6, "eos_token_id": []}, {"eos_token_id": 3}, {"eos_token_id": 3}),
        ({}, None, {}),
    ],
)
def test_ids_of_an_import_without_a_tokenizer_are_those_of_its_export(
    tmp_path: Path, config: Any, generation: Any, expected: Any
) -> None:
    hf = export(tiny_checkpoint(tmp_path / "run"), None, tmp_path / "hf", logical_shapes(TINY))
    (hf / "config.json").write_text(json.dumps(json.loads((hf / "config.json").read_text()) | config))
    (hf / "generation_config.json").unlink()
    if generation is not None:
        (hf / "generation_config.json").write_text(json.dumps(generation))
    out = export(import_(hf, tmp_path / "imported"), None, tmp_path / "out", logical_shapes(TINY))
    written = json.loads((out / "config.json").read_text())
    assert {key: written[key] for key in IDS} == (IDS if config is IDS else dict.fromkeys(IDS))
    assert json.loads((out / "generation_config.json").read_text()) == expected
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == expected.get("eos_token_id")


def test_ids_that_the_tokenizer_does_not_have_come_from_the_imported_config(tmp_path: Path) -> None:
    """Qwen's tokenizer has no beginning of text, but its config.json does."""
    hf = write_word_tokenizer(export(tiny_checkpoint(tmp_path / "run"), None, tmp_path / "hf", logical_shapes(TINY)))
    (hf / "config.json").write_text(json.dumps(json.loads((hf / "config.json").read_text()) | IDS))
    imported = import_(hf, tmp_path / "imported")
    assert imported.tokenizer_spec
    tokenizer = load_tokenizer(imported.tokenizer_spec)
    out = export(imported, tokenizer, tmp_path / "out", logical_shapes(TINY))
    written = json.loads((out / "config.json").read_text())
    assert {key: written[key] for key in IDS} == IDS | {"eos_token_id": tokenizer.eod_id}
    weights = export(imported, tokenizer, tmp_path / "weights", logical_shapes(TINY), with_tokenizer=False)
    for directory in (out, weights):
        assert json.loads((directory / "generation_config.json").read_text()) == IDS | {"eos_token_id": 2}

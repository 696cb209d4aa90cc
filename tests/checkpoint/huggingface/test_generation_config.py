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

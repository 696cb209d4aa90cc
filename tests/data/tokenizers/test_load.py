"""Which tokenizer a name or a path stands for, and clear errors for what is not a tokenizer."""

import json

import pytest

from engine.checkpoint.huggingface.tokenizer_files import sentencepiece_tokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from tests.data.tokenizers.examples import huggingface


def test_the_kind_is_seen_from_the_content(tmp_path, sentencepiece_file, huggingface_file):
    for file, kind in ((sentencepiece_file, "sentencepiece"), (huggingface_file, "huggingface")):
        renamed = file.rename(tmp_path / f"{kind}.bin")
        assert load_tokenizer(renamed).kind == kind


def test_directories(tmp_path, sentencepiece_model):
    only_json = huggingface(tmp_path / "json", ["</s>"]).parent
    assert load_tokenizer(only_json).kind == "huggingface"
    (only_json / "tokenizer.model").write_bytes(sentencepiece_model)
    assert load_tokenizer(str(only_json)).kind == "sentencepiece"
    own_name = tmp_path / "own"
    own_name.mkdir()
    (own_name / "mine.model").write_bytes(sentencepiece_model)
    assert load_tokenizer(own_name).files == [own_name / "mine.model"]
    (own_name / "yours.model").write_bytes(sentencepiece_model)
    with pytest.raises(ConfigError, match=r"mine\.model, yours\.model; name one"):
        load_tokenizer(own_name)


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage" * 100, b"{", b'{"version": "1.0"}', b"\x00" * 50])
def test_files_that_are_no_tokenizer(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.model"):
        load_tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize(("name", "seen"), [("gone.model", "no such file"), (".", "a directory without one")])
def test_missing(tmp_path, name, seen):
    with pytest.raises(ConfigError, match=f"{seen}; expected a SentencePiece model"):
        load_tokenizer(tmp_path / name)


def test_a_directory_whose_json_knows_more_tokens_than_its_model(tmp_path, sentencepiece_model):
    """As models have it that learned to chat after their tokenizer was made."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    plain, settings = sentencepiece_tokenizer(sentencepiece_model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "sentencepiece"
    more = {**plain["added_tokens"][-1], "id": tokenizer.vocab_size, "content": "<|im_end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**plain, "added_tokens": [*plain["added_tokens"], more]}))
    extended = load_tokenizer(tmp_path)
    assert (extended.kind, extended.special_tokens["<|im_end|>"]) == ("huggingface", tokenizer.vocab_size)
    assert load_tokenizer(tmp_path / "tokenizer.model").kind == "sentencepiece"


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]"])
def test_a_hostile_configuration_beside_a_tokenizer(tmp_path, huggingface_file, content):
    (tmp_path / "tokenizer.json").write_bytes(huggingface_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)

"""Which tokenizer a name or a path stands for, and clear errors for what is not a tokenizer."""

import json

import pytest

from engine.checkpoint.huggingface.tokenizer_files import sentencepiece_tokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece
from tests.data.tokenizers.examples import huggingface


def test_the_kind_is_seen_from_the_content(tmp_path, sentencepiece_file, huggingface_file):
    for file, kind in ((sentencepiece_file, "sentencepiece"), (huggingface_file, "huggingface")):
        renamed = file.rename(tmp_path / f"{kind}.bin")
        assert load_tokenizer(renamed).kind == kind


def test_directories(tmp_path, sentencepiece_model):
    only_json = huggingface(tmp_path / "json", ["</s>"]).parent
    assert load_tokenizer(only_json).kind == "huggingface"
    (only_json / "tokenizer.model").write_bytes(sentencepiece_model)
    other = load_tokenizer(str(only_json))
    assert other.kind == "huggingface" and other.note is not None
    assert "tokenizer.json is read, not tokenizer.model: '</s>'" in other.note
    named = load_tokenizer(only_json / "tokenizer.model")
    assert named.kind == "sentencepiece" and named.note is not None
    assert [file.name for file in named.files] == ["tokenizer.model"], "a checkpoint must load as this tokenizer"
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


CHAT = ["[INST]", "[/INST]"]
SPACES = ["{}[INST] a [/INST] b</s>", "{}[INST]a[/INST]b</s>", "{} x</s>y"]


@pytest.mark.parametrize(
    ("symbols", "settings"),
    [(CHAT, {"legacy": False}), (CHAT, {"legacy": True}), (CHAT, {}), ([], {"legacy": False})],
    ids=["mistral v3", "legacy", "unsaid", "without symbols"],
)
def test_text_behind_control_tokens_is_what_transformers_gives(tmp_path, symbols, settings):
    """With a `tokenizer.json` beside the model, made by transformers from it, and without."""
    transformers = pytest.importorskip("transformers")
    model = train_sentencepiece(standard_library_texts(20_000), vocab_size=400, control_symbols=symbols)
    (tmp_path / "tokenizer.model").write_bytes(model)
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    alone = load_tokenizer(tmp_path)
    (tmp_path / "both").mkdir()
    theirs.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_bytes(model)
    both = load_tokenizer(tmp_path / "both")
    assert settings.get("legacy", False) or not alone.prefix_parts
    for text in (text.format("<s>") for text in SPACES):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert both.encode_special(text)[0] == expected, text
        if not settings.get("legacy"):
            assert alone.encode_special(text)[0] == expected, text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocab.txt", b"[PAD]\n", "of a kind that is not read here"),
        ("qwen.tiktoken", b"IQ== 0\n", "is a tiktoken file, which has no pattern"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n" * 9, "known for Llama 3, cl100k_base, o200k_base only"),
        ("vocab.json", b"{}", "GPT2Tokenizer or Qwen2Tokenizer, not None"),
    ],
)
def test_kinds_that_are_not_read_say_how_to_go_on(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{reason}.*; AutoTokenizer.* writes a tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("role", ["eos_token", "bos_token"])
def test_a_named_token_that_the_model_lacks_is_refused(tmp_path, sentencepiece_model, role):
    """As chat models have it whose directory holds a model file without the list of added tokens."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({role: "<|im_end|>"}))
    for spec in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(ConfigError, match=rf"lacks {role} = '<\|im_end\|>'.*AutoTokenizer.*a tokenizer\.json"):
            load_tokenizer(spec)
    plain, _ = sentencepiece_tokenizer(sentencepiece_model)
    more = {**plain["added_tokens"][-1], "id": 500, "content": "<|im_end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**plain, "added_tokens": [*plain["added_tokens"], more]}))
    assert load_tokenizer(tmp_path).kind == "huggingface"
    with pytest.raises(ConfigError, match=f"lacks {role}"):  # named, it would be alone in a checkpoint
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({role: "</s>"}))
    assert load_tokenizer(tmp_path).kind == "sentencepiece"

"""SentencePiece models: ends, special tokens, spans."""

import json

import pytest
from tokenizers import Tokenizer as Backend

from engine.checkpoint.huggingface.tokenizer_files import sentencepiece_tokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece
from tests.data.tokenizers.examples import assert_spans_follow_the_text, spelled_out

CONTROL = {"control_symbols": ["<|im_start|>", "<|im_start|>x", "<|im_end|>"]}
MODELS = {
    "identity": CONTROL,
    "normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, **CONTROL},
    "no space in front": {"add_dummy_prefix": False, **CONTROL},
    "symbols": {"user_defined_symbols": ["<|im_start|>", "\n\n", "<|im"]},
    "unknowns": {"byte_fallback": False, **CONTROL},
    "unigram": {"model_type": "unigram", **CONTROL},
}


@pytest.fixture(scope="module", params=MODELS)
def special_model(request, tmp_path_factory):
    """The kind of a model and its file."""
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(standard_library_texts(20_000), vocab_size=400, **MODELS[request.param]))
    return request.param, path


def test_sentencepiece(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (500, 1, 2)
    assert tokenizer.files == [sentencepiece_file]
    assert "gigatoken" in tokenizer.encoder
    assert load_tokenizer(sentencepiece_file, fast=False).encoder == "sentencepiece (as requested)"


def test_the_hash_tells_models_apart(tmp_path, sentencepiece_model, sentencepiece_file):
    other = tmp_path / "other.model"
    other.write_bytes(sentencepiece_model)
    assert load_tokenizer(other).hash == load_tokenizer(sentencepiece_file).hash
    other.write_bytes(train_sentencepiece(standard_library_texts(30_000), vocab_size=400))
    assert load_tokenizer(other).hash != load_tokenizer(sentencepiece_file).hash


def test_truncated_model(sentencepiece_file, sentencepiece_model):
    for size in (1, 100, len(sentencepiece_model) // 2, len(sentencepiece_model) - 1):
        sentencepiece_file.write_bytes(sentencepiece_model[:size])
        with pytest.raises(ConfigError, match="damaged"):
            load_tokenizer(sentencepiece_file)


def test_model_without_an_end(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(standard_library_texts(30_000), vocab_size=400, eos_id=-1))
    with pytest.raises(ConfigError, match="end-of-sentence"):
        load_tokenizer(path)


def test_sentencepiece_special_tokens_are_those_of_its_export(special_model):
    """And the spans those that the package tokenizers finds, where the model rewrites nothing."""
    name, path = special_model
    tokenizer = load_tokenizer(path)
    exported = Backend.from_str(json.dumps(sentencepiece_tokenizer(path.read_bytes())[0]))
    controls = {token.content: i for i, token in exported.get_added_tokens_decoder().items() if token.special}
    assert tokenizer.special_tokens == controls and {"<s>", "</s>"} <= controls.keys()
    for text in spelled_out(200):
        ids, spans = tokenizer.encode_special(text)
        expected = exported.encode(text, add_special_tokens=False)
        assert ids == expected.ids
        assert_spans_follow_the_text(text, ids, spans)
        assert all(
            controls[text[slice(*span)]] == i for i, span in zip(ids, spans, strict=True) if i in controls.values()
        )
        if name in ("identity", "no space in front", "symbols"):
            assert spans == expected.offsets


def test_sentencepiece_spans_of_rewritten_text(special_model):
    name, path = special_model
    if name == "normalized":
        text = "  ½ e\u0301</s>  x"
        ids, spans = load_tokenizer(path).encode_special(text)
        covered = [text[start:end] for start, end in spans]
        assert covered[-2:] == ["</s>", "x"] or covered[-3:] == ["</s>", "x", "x"]
        assert "½" in covered and "e\u0301" in covered
        assert_spans_follow_the_text(text, ids, spans)


def test_sentencepiece_takes_its_companions_along(sentencepiece_file):
    template = sentencepiece_file.with_name("chat_template.jinja")
    template.write_text("x")
    assert load_tokenizer(sentencepiece_file).files == [sentencepiece_file, template]

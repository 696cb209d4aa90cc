"""`tokenizer.json`: ends, gaps, special tokens, spans."""

import json
import sys

import pytest

from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from engine.testing.tokenizers import NASTY_TEXTS
from tests.data.tokenizers.examples import assert_spans_follow_the_text, huggingface, spelled_out


def test_huggingface(huggingface_file):
    tokenizer = load_tokenizer(huggingface_file)
    assert (tokenizer.bos_id, tokenizer.eod_id) == (0, 1)
    assert len(tokenizer.encode("a b c d e f g")) > 3, "the truncation of the file must not cut documents"


def test_huggingface_vocabulary_with_a_gap(huggingface_file):
    """`vocab_size` is what an embedding needs, not the number of entries."""
    content = json.loads(huggingface_file.read_text())
    entry = {**content["added_tokens"][0], "id": 1000, "content": "<far>"}
    content["added_tokens"].append(entry)
    content["model"]["vocab"]["<far>"] = 1000
    huggingface_file.write_text(json.dumps(content))
    assert load_tokenizer(huggingface_file).vocab_size == 1001


@pytest.mark.parametrize("value", ["<end>", {"content": "<end>", "lstrip": False}])
def test_huggingface_end_from_its_configuration(tmp_path, value):
    path = huggingface(tmp_path, ["</s>", "<end>"], {"eos_token": value, "bos_token": None})
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod_id == 1
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("special", "configuration", "message"),
    [
        ([], None, "tokenizer_config.json"),
        (["<end>"], {}, "the token that ends a document"),
        (["</s>"], {"eos_token": "<gone>"}, "'<gone>'.*not in the vocabulary"),
        (["</s>"], [1], "a list, expected an object"),
    ],
)
def test_huggingface_without_an_end(tmp_path, special, configuration, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(huggingface(tmp_path, special, configuration))


def test_huggingface_special_tokens(tmp_path, huggingface_file):
    tokenizer = load_tokenizer(huggingface_file)
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1}
    for text in (*spelled_out(100), *NASTY_TEXTS):
        ids, spans = tokenizer.encode_special(text)
        assert ids == tokenizer.encode(text)
        assert_spans_follow_the_text(text, ids, spans)


def test_huggingface_spans_have_their_spaces(tmp_path):
    """Some files ask for spans without the spaces at their ends, which then belong to no token."""
    path = huggingface(tmp_path, ["</s>"])
    content = json.loads(path.read_text())
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(content))
    text = "a  b \n\n c</s>"
    _, spans = load_tokenizer(path).encode_special(text)
    assert "".join(text[start:end] for start, end in spans) == text


def test_without_the_package_tokenizers(huggingface_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"triaxis\[hf\]"):
        load_tokenizer(huggingface_file)


NAMES = {
    "in the configuration": {"tokenizer_config.json": {"eos_token": "<end>"}},
    "in the map": {"special_tokens_map.json": {"eos_token": {"content": "<end>"}}},
    "the map overrides an old configuration": {
        "tokenizer_config.json": {"eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": "<end>"},
    },
    "a new configuration overrides the map": {
        "tokenizer_config.json": {"eos_token": "<end>", "added_tokens_decoder": {}},
        "special_tokens_map.json": {"eos_token": "</s>"},
    },
}


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("files", NAMES.values(), ids=NAMES)
def test_named_tokens_are_those_of_transformers(tmp_path, files, flagged):
    """Also if `tokenizer.json` does not flag them as special, or has them as ordinary entries."""
    transformers = pytest.importorskip("transformers")
    path = huggingface(tmp_path, ["</s>", "<end>"])
    if not flagged:
        content = json.loads(path.read_text())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<end>"]
        path.write_text(json.dumps(content))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **content}))
    tokenizer = load_tokenizer(path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.eod_id == theirs.eos_token_id == 1
    assert tokenizer.special_tokens["<end>"] == 1
    assert tokenizer.encode_special("a<end>b")[0] == theirs.encode("a<end>b", add_special_tokens=False)

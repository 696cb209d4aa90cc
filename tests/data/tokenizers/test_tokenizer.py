"""Tokenizers: round trips, the ids that end documents, and clear errors for what is not a tokenizer."""

import json
import random
import sys
from itertools import pairwise

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.checkpoint.huggingface.tokenizer_files import sentencepiece_tokenizer
from engine.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer, stream_text
from engine.errors import ConfigError
from engine.testing.tokenizers import NASTY_TEXTS, standard_library_texts, train_sentencepiece

TEXTS = ["def f(x):\n    return x\n", "a  b\tc", "naïve 中文 👩‍👩‍👧", "\x00\x7f"]


@pytest.fixture(scope="session")
def sentencepiece_model():
    return train_sentencepiece(standard_library_texts(50_000), vocab_size=500)


@pytest.fixture
def sentencepiece_file(tmp_path, sentencepiece_model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model)
    return path


@pytest.fixture
def huggingface_file(tmp_path):
    return huggingface(tmp_path, special=["<s>", "</s>"])


def huggingface(folder, special, configuration=None):
    """A byte-level BPE `tokenizer.json` with a truncation, as trainers leave it in there."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.enable_truncation(3)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if configuration is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder / "tokenizer.json"


@pytest.fixture(params=["byte", "sentencepiece", "huggingface"])
def tokenizer(request):
    spec = "byte" if request.param == "byte" else request.getfixturevalue(f"{request.param}_file")
    return load_tokenizer(spec)


def test_round_trip(tokenizer):
    for text in [*TEXTS, *NASTY_TEXTS]:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        expected = text.replace("\u2581", " ") if tokenizer.kind == "sentencepiece" else text
        assert tokenizer.decode(ids) == expected


def test_batches_are_the_single_texts(tokenizer):
    texts = [*TEXTS, *NASTY_TEXTS]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_no_ends_are_added(tokenizer):
    for ids in tokenizer.encode_batch(TEXTS):
        assert not {tokenizer.eod_id, tokenizer.bos_id} & set(ids.tolist())


def test_streamed_text_is_the_decoded_text(tokenizer):
    choose = random.Random(0)
    cases = [tokenizer.encode(text)[: choose.randrange(1, 60)] for text in TEXTS * 5]
    cases += [choose.choices(range(tokenizer.vocab_size), k=choose.randrange(20)) for _ in range(300)]
    cases += [choose.choices(range(min(262, tokenizer.vocab_size)), k=20) for _ in range(300)]
    for ids in cases:
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_streamed_characters_come_whole_and_at_once(tokenizer):
    parts = list(stream_text(tokenizer, tokenizer.encode("a中b")))
    assert "\ufffd" not in "".join(parts)
    assert "中" in "".join(parts[:-2])  # before the last id and the rest


def test_byte():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id, tokenizer.hash) == (257, 256, None, "byte")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 256, 0xC3]) == "a\ufffd"
    assert tokenizer.files == []


def test_sentencepiece(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (500, 1, 2)
    assert tokenizer.files == [sentencepiece_file]
    assert "gigatoken" in tokenizer.encoder
    assert load_tokenizer(sentencepiece_file, fast=False).encoder == "sentencepiece (as asked)"


def test_the_hash_tells_models_apart(tmp_path, sentencepiece_model, sentencepiece_file):
    other = tmp_path / "other.model"
    other.write_bytes(sentencepiece_model)
    assert load_tokenizer(other).hash == load_tokenizer(sentencepiece_file).hash
    other.write_bytes(train_sentencepiece(standard_library_texts(30_000), vocab_size=400))
    assert load_tokenizer(other).hash != load_tokenizer(sentencepiece_file).hash


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
        (["<end>"], {}, "which token ends a document"),
        (["</s>"], {"eos_token": "<gone>"}, "'<gone>'.*not in the vocabulary"),
        (["</s>"], [1], "a list, expected an object"),
    ],
)
def test_huggingface_without_an_end(tmp_path, special, configuration, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(huggingface(tmp_path, special, configuration))


def test_without_the_package_tokenizers(huggingface_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"triaxis\[hf\]"):
        load_tokenizer(huggingface_file)


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


@pytest.mark.parametrize(("name", "seen"), [("gone.model", "no such file"), (".", "a directory without one")])
def test_missing(tmp_path, name, seen):
    with pytest.raises(ConfigError, match=f"{seen}; expected a SentencePiece model"):
        load_tokenizer(tmp_path / name)


# Special tokens that a text spells out

CONTROL = {"control_symbols": ["<|im_start|>", "<|im_start|>x", "<|im_end|>"]}
MODELS = {
    "identity": CONTROL,
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, **CONTROL},
    "no space in front": {"add_dummy_prefix": False, **CONTROL},
    "symbols": {"user_defined_symbols": ["<|im_start|>", "\n\n", "<|im"]},
    "unknowns": {"byte_fallback": False, **CONTROL},
    "unigram": {"model_type": "unigram", **CONTROL},
}
PARTS = ["<s>", "</s>", "<unk>", "<s>x", "<|im_start|>", "<|im_start|>x", "<|im_end|>", "<|im_en", "\n\n", "aaaa"]
PARTS += [
    "  ",
    "    ",
    "the ",
    "self.",
    " ",
    "return",
    "é",
    "漢字",
    "🎉",
    "\t",
    "0123",
    "ﬁ",
    "½",
    "e\u0301",
    "\u2581",
    "\x00",
]


def spelt_out(count):
    choose = random.Random(0)
    yield from ("", " ", "<s>", "</s> ", " <s>a", "a<s> b")
    for _ in range(count):
        yield "".join(choose.choices(PARTS, k=choose.randrange(20)))


def assert_spans_follow_the_text(text, ids, spans):
    assert len(ids) == len(spans)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert all(before <= after for before, after in pairwise(spans) if before[0] != after[0])


@pytest.fixture(scope="module", params=MODELS)
def special_model(request, tmp_path_factory):
    """The kind of a model and its file."""
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(standard_library_texts(20_000), vocab_size=400, **MODELS[request.param]))
    return request.param, path


def test_sentencepiece_special_tokens_are_those_of_its_export(special_model):
    """And the spans those that the package tokenizers finds, where the model rewrites nothing."""
    name, path = special_model
    tokenizer = load_tokenizer(path)
    exported = Backend.from_str(json.dumps(sentencepiece_tokenizer(path.read_bytes())[0]))
    controls = {token.content: i for i, token in exported.get_added_tokens_decoder().items() if token.special}
    assert tokenizer.special_tokens == controls and {"<s>", "</s>"} <= controls.keys()
    for text in spelt_out(200):
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
    if name == "normalised":
        text = "  ½ e\u0301</s>  x"
        ids, spans = load_tokenizer(path).encode_special(text)
        covered = [text[start:end] for start, end in spans]
        assert covered[-2:] == ["</s>", "x"] or covered[-3:] == ["</s>", "x", "x"]
        assert "½" in covered and "e\u0301" in covered
        assert_spans_follow_the_text(text, ids, spans)


def test_byte_special_tokens():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.special_tokens == {"<|endoftext|>": 256}
    ids, spans = tokenizer.encode_special("aé<|endoftext|>b<|endoftext")
    assert ids == [97, 0xC3, 0xA9, 256, 98, *b"<|endoftext"]
    assert spans[:5] == [(0, 1), (1, 2), (1, 2), (2, 15), (15, 16)]
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_huggingface_special_tokens(tmp_path, huggingface_file):
    tokenizer = load_tokenizer(huggingface_file)
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1}
    for text in (*spelt_out(100), *NASTY_TEXTS):
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


def test_sentencepiece_takes_its_companions_along(sentencepiece_file):
    template = sentencepiece_file.with_name("chat_template.jinja")
    template.write_text("x")
    assert load_tokenizer(sentencepiece_file).files == [sentencepiece_file, template]


def test_byte_tokenizers_share_nothing():
    ByteTokenizer().files.append("x")
    assert ByteTokenizer().files == []


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

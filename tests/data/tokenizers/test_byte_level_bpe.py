"""Tekken, tiktoken, `vocab.json` with `merges.txt`, and added tokens: ids are those of the libraries of these files."""

import base64
import hashlib
import json
import shutil
from itertools import pairwise

import pytest

from engine.checkpoint.huggingface.exported_ids import require_trained_ids
from engine.checkpoint.huggingface.tokenizer_files import write_tokenizer
from engine.checkpoint.storage import Storage
from engine.data.tokenizers.byte_level_bpe import CL100K, TIKTOKEN_FILES, Tiktoken, byte_letters
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from tests.data.tokenizers.examples import byte_ranks, hostile_texts, write_tekken, write_tiktoken

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")


@pytest.fixture(scope="session")
def ranks():
    return byte_ranks()


@pytest.fixture
def tekken(tmp_path, ranks):
    return write_tekken(tmp_path / "tekken.json", ranks)


@pytest.fixture
def tiktoken_file(tmp_path, ranks, monkeypatch):
    """A file whose content is known, as that of Llama 3's is."""
    path = write_tiktoken(tmp_path / "tokenizer.model", ranks)
    kind = Tiktoken("tiny", CL100K, dict(enumerate(SPECIAL, len(ranks))))
    monkeypatch.setitem(TIKTOKEN_FILES, hashlib.sha256(path.read_bytes()).hexdigest(), kind)
    return path


def write_vocabulary(folder, ranks, config):
    """The tokens as `vocab.json` and `merges.txt`, in the order in which they merge."""
    text = {token: token.decode("latin-1").translate(byte_letters()) for token in ranks}
    known, lines = set(ranks[:256]), ["#version: 0.2"]
    for token in ranks[256:]:
        cut = next(i for i in range(1, len(token)) if token[:i] in known and token[i:] in known)
        lines.append(f"{text[token[:cut]]} {text[token[cut:]]}")
        known.add(token)
    vocab = {text[token]: i for i, token in enumerate(ranks)} | {"<|endoftext|>": len(ranks)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def merged(piece, ids):
    """Merge the bytes of a word, pair of lowest rank first and from the left: the definition of tiktoken."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ids[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            return [ids[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_words_merge_by_rank(tiktoken_file, ranks):
    from tokenizers import Regex, pre_tokenizers

    tokenizer, split = load_tokenizer(tiktoken_file), pre_tokenizers.Split(Regex(CL100K), "isolated")
    ids = {token: i for i, token in enumerate(ranks)}
    for text in hostile_texts(400):
        words = [word.encode() for word, _ in split.pre_tokenize_str(text)]
        assert tokenizer.encode(text) == [i for word in words for i in merged(word, ids)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_tiktoken(tiktoken_file, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer, ids = load_tokenizer(tiktoken_file), {token: i for i, token in enumerate(ranks)}
    special = dict(zip(SPECIAL, range(len(ranks), len(ranks) + 3), strict=True))
    theirs = tiktoken.Encoding("tiny", pat_str=CL100K, mergeable_ranks=ids, special_tokens=special)
    for text in (*hostile_texts(2000), "a<|eot_id|> b<|end_of_text|>"):
        assert tokenizer.encode(text) == theirs.encode(text, allowed_special="all"), text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (theirs.n_vocab, len(ranks), len(ranks) + 1)


def test_ids_of_mistral_common(tekken):
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    tokenizer, theirs = load_tokenizer(tekken), module.Tekkenizer.from_file(tekken)
    for text in hostile_texts(2000, seed=1):
        assert tokenizer.encode(text) == theirs.encode(text, bos=False, eos=False), text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)


def test_tekken_has_its_special_tokens_first(tekken, ranks):
    tokenizer = load_tokenizer(tekken.parent)
    assert [tokenizer.special_tokens[name] for name in ("<unk>", "<s>", "[/INST]", "<SPECIAL_29>")] == [0, 1, 4, 29]
    assert tokenizer.vocab_size == len(ranks) + 25, "the last tokens of the file are not in its vocabulary"
    assert tokenizer.encode("[INST]a") == [3, 30 + ranks.index(b"a")]
    old = load_tokenizer(write_tekken(tekken.with_name("tekken.json"), ranks, special=None))
    assert (old.special_tokens["[TOOL_CONTENT]"], old.special_tokens["<SPECIAL_20>"]) == (19, 20)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"rank": 7', '"rank": 8', "the ranks are not contiguous"),
        ('"default_vocab_size"', '"vocab_size"', "KeyError: 'default_vocab_size'"),
        ('"default_num_special_tokens": 30', '"default_num_special_tokens": 3', "5 special tokens, but names"),
        ('"token_str": "[INST]"', '"token_str": "a"', "'a' as a special and as an ordinary token"),
    ],
)
def test_a_damaged_tekken_file(tekken, old, new, message):
    content = tekken.read_text()
    assert old in content
    tekken.write_text(content.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tekken)


ADDED = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CLASSES = {
    "gpt2": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"},
    "gpt2, with a space": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "add_prefix_space": True},
    "qwen2": {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|endoftext|>"},
}


def test_a_tekken_file_that_would_take_all_memory_or_hours(tekken, ranks):
    content = json.loads(tekken.read_text())
    size = {"default_vocab_size": 10**12, "default_num_special_tokens": 10**12}
    long = [{"rank": 0, "token_bytes": base64.b64encode(b"a" * 10**6).decode(), "token_str": None}]
    for changes in ({"config": content["config"] | size}, {"vocab": long}):
        tekken.write_text(json.dumps(content | changes))
        with pytest.raises(ConfigError, match="special tokens or a token of more than 4096 bytes"):
            load_tokenizer(tekken)


@pytest.mark.parametrize("config", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("added", [None, "decoder", "file"])
def test_vocabulary_and_merges_give_the_ids_of_transformers(tmp_path, ranks, config, added):
    transformers = pytest.importorskip("transformers")
    i = len(ranks) + 1
    if added == "decoder":
        config = config | {"added_tokens_decoder": {str(i): ADDED | {"special": True}}}
    elif added == "file":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": i}))
    write_vocabulary(tmp_path, ranks, config)
    tokenizer = load_tokenizer(tmp_path)
    name = config["tokenizer_class"].removesuffix("Fast")
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(theirs) == i + bool(added)
    for text in (*hostile_texts(300, seed=2), "a<|im_end|> b<|endoftext|>c"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_a_vocabulary_without_merges_is_an_error(tmp_path, ranks):
    (write_vocabulary(tmp_path, ranks, CLASSES["gpt2"]) / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"merges\.txt: No such file"):
        load_tokenizer(tmp_path)


def test_added_tokens_are_those_of_transformers(tmp_path, ranks, tekken):
    """Of a `tokenizer.json` that lacks them; a token that would get another id is refused."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "json"
    folder.mkdir()
    plain = load_tokenizer(tekken)
    (folder / "tokenizer.json").write_text(json.dumps(plain.to_json()))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    first = {str(plain.vocab_size): ADDED | {"special": True}}
    second = {str(plain.vocab_size + 1): ADDED | {"content": "wide", "special": False, "lstrip": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"added_tokens_decoder": second | first}))
    tokenizer, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (plain.vocab_size, plain.vocab_size + 2)
    for text in ("a<|im_end|>b", "a  wide", "widewide <|im_end|>"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"added_tokens_decoder": second}))
    with pytest.raises(ConfigError, match=rf"'wide' has id {plain.vocab_size + 1} in the added tokens.*correct one"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"added_tokens_decoder": {"x": {}}}))
    with pytest.raises(ConfigError, match="are no ids with texts"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_with_added_tokens(tmp_path, sentencepiece_model):
    """As chat models have it whose tokens were added to a model without a `tokenizer.json`."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "legacy": False}
    config["added_tokens_decoder"] = {"500": ADDED | {"special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.kind, tokenizer.eod_id, tokenizer.vocab_size) == ("huggingface", 500, 501)
    for text in ("def f(x):<|im_end|>\n<s>a b", "two  spaces<|im_end|> ", "x <|im_end|> y"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text


KINDS = ["tekken", "tiktoken", "vocabulary", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
def test_copied_and_exported_files_give_the_same_ids(tmp_path, request, kind, ranks, sentencepiece_model):
    """The files that a checkpoint copies, and the `tokenizer.json` of an export."""
    source = tmp_path / "source"
    source.mkdir()
    if kind == "vocabulary":
        write_vocabulary(source, ranks, CLASSES["qwen2"])
        (source / "added_tokens.json").write_text(json.dumps({"<|im_end|>": len(ranks) + 1}))
    elif kind == "sentencepiece":
        (source / "tokenizer.model").write_bytes(sentencepiece_model)
        (source / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 500}))
        (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    else:
        shutil.move(request.getfixturevalue("tekken" if kind == "tekken" else "tiktoken_file"), source)
    tokenizer = load_tokenizer(source)
    copied, target = tmp_path / "copied", tmp_path / "target"
    copied.mkdir()
    target.mkdir()
    for file in tokenizer.files:
        shutil.copy(file, copied)
    again = load_tokenizer(copied)
    write_tokenizer(Storage(), target, copied, again)
    assert sorted(file.name for file in target.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    require_trained_ids(target, tokenizer)
    exported = load_tokenizer(target)
    assert (again.hash, exported.eod_id, exported.bos_id) == (tokenizer.hash, tokenizer.eod_id, tokenizer.bos_id)
    for text in hostile_texts(100, seed=3):
        assert tokenizer.encode(text) == again.encode(text) == exported.encode(text), text


def test_a_directory_with_a_tokenizer_json_beside_an_original_file(tmp_path, ranks, tekken):
    """The former is read; the difference is said."""
    plain = load_tokenizer(tekken)
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain.to_json()))
    both = load_tokenizer(tmp_path)
    assert (both.files[0].name, both.note) == ("tokenizer.json", None)
    write_tekken(tekken, ranks, count=31)
    other = load_tokenizer(tmp_path)
    assert other.note is not None and "tokenizer.json is read, not tekken.json: " in other.note
    tekken.unlink()
    write_tiktoken(tmp_path / "tokenizer.model", ranks)
    unknown = load_tokenizer(tmp_path)
    assert unknown.note is not None and "not compared" in unknown.note


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
@pytest.mark.parametrize("kind", ["tekken", "sentencepiece"])
def test_an_export_starts_texts_as_the_original_does(tmp_path, ranks, sentencepiece_model, kind, config):
    """With the beginning-of-text token in `transformers`, which `encode` never adds."""
    transformers = pytest.importorskip("transformers")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    if kind == "tekken":
        write_tekken(source / "tekken.json", ranks)
    else:
        (source / "tokenizer.model").write_bytes(sentencepiece_model)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(source)
    assert tokenizer.adds_bos == config.get("add_bos_token", kind == "tekken")
    write_tokenizer(Storage(), target, source, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    assert theirs.encode("a b") == begin + list(tokenizer.encode("a b"))
    assert load_tokenizer(target).adds_bos == tokenizer.adds_bos
    require_trained_ids(target, tokenizer)

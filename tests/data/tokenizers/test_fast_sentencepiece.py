"""The fast encoder gives the ids of SentencePiece, or steps aside."""

import random

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from engine.data.tokenizers import fast_sentencepiece
from engine.data.tokenizers.fast_sentencepiece import EncoderMismatch, FastSentencePiece, UnsupportedModel
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer
from engine.testing.tokenizers import NASTY_TEXTS, standard_library_texts, train_sentencepiece

NFKC = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


@pytest.fixture(scope="session")
def texts():
    return list(standard_library_texts(150_000))


@pytest.fixture(scope="session")
def train(texts):
    """Trains each kind of model once."""
    models = {}

    def train(vocab_size=600, **options):
        key = repr((vocab_size, options))
        if key not in models:
            models[key] = train_sentencepiece(texts, vocab_size=vocab_size, **options)
        return models[key]

    return train


def both(model):
    processor = SentencePieceProcessor(model_proto=model)
    return processor, FastSentencePiece(processor, model)


def differing(processor, fast, texts):
    return [text for text in texts if fast.encode(text).tolist() != processor.encode(text)]


def random_texts(processor, count, seed):
    """Pieces in random order, random characters, runs of one character."""
    choose = random.Random(seed)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    alphabets = [" \t\n\r\u2581", "ab -=", "é中\u0301ﬁ👩\u200d", "".join(map(chr, range(32, 127))), "<s>/unk0xA"]
    for i in range(count):
        size = choose.choice((1, 2, 3, 5, 10, 50, 200))
        if i % 3 == 0:
            yield "".join(choose.choices(pieces, k=size)).replace("\u2581", choose.choice((" ", "\u2581")))
        elif i % 3 == 1:
            yield "".join(choose.choices("".join(choose.sample(alphabets, 2)), k=size))
        else:
            yield "".join(choose.choice(" a=\n0中") * choose.randrange(1, 80) for _ in range(size // 5 + 1))


@pytest.mark.parametrize("options", [{}, NFKC, {"add_dummy_prefix": False}, {"vocab_size": 2000, "split_digits": True}])
def test_same_ids_as_sentencepiece(train, texts, options):
    processor, fast = both(train(**options))
    lines = [line for text in texts[:40] for line in text.splitlines()]
    assert len(lines) > 2000
    assert differing(processor, fast, [*texts, *lines, *NASTY_TEXTS, *random_texts(processor, 1500, seed=1)]) == []


def test_user_defined_symbols_are_left_to_sentencepiece(train):
    processor, fast = both(train(user_defined_symbols=["<|x|>", "ret", "\n", "\u2581\u2581"]))
    texts = ["return", "a<|x|>b", "a\nb\n", "  a   b", "plain", " r e t", "\u2581\u2581a"]
    assert differing(processor, fast, [*texts, *random_texts(processor, 500, seed=2)]) == []


def test_control_symbols_in_a_text_are_text(train):
    processor, fast = both(train())
    for text in ("<s>", "a</s> b", "<unk>", "<0x0A>"):
        assert not {processor.bos_id(), processor.eos_id(), processor.unk_id()} & set(fast.encode(text).tolist())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "spaces after words"),
        ({"split_by_whitespace": False}, "a space inside"),
    ],
)
def test_other_models_are_encoded_by_sentencepiece_itself(train, texts, tmp_path, options, reason):
    model = train(**options)
    processor = SentencePieceProcessor(model_proto=model)
    with pytest.raises(UnsupportedModel, match=reason):
        FastSentencePiece(processor, model)
    (tmp_path / "a.model").write_bytes(model)
    tokenizer = SentencePieceTokenizer(tmp_path / "a.model")
    assert reason in tokenizer.encoder
    some = [*texts[:20], *NASTY_TEXTS, *random_texts(processor, 200, seed=3)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(some)] == [processor.encode(text) for text in some]


def test_tied_scores_are_refused(train):
    """SentencePiece then merges by position, which the other program does not know."""
    model = train()
    piece = fast_sentencepiece.fields_of(model)
    first, second = [value for number, value in piece if number == 1][300:302]
    tied = model.replace(second, second[: second.index(b"\x15") + 1] + first[first.index(b"\x15") + 1 :][:4])
    with pytest.raises(UnsupportedModel, match="same score"):
        FastSentencePiece(SentencePieceProcessor(model_proto=tied), tied)


def test_without_gigatoken(train, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    (tmp_path / "a.model").write_bytes(train())
    tokenizer = SentencePieceTokenizer(tmp_path / "a.model")
    assert "pip install 'triaxis[hf]'" in tokenizer.encoder
    assert tokenizer.encode_batch(["a b"])[0].tolist() == tokenizer.encode("a b")


def test_wrong_merges_fail_the_self_test(train, monkeypatch):
    right = fast_sentencepiece.merges
    monkeypatch.setattr(fast_sentencepiece, "merges", lambda scores: right(scores)[::-1])
    with pytest.raises(UnsupportedModel, match="self-test"):
        both(train())


def test_sampled_texts_are_compared(train, monkeypatch):
    monkeypatch.setattr(fast_sentencepiece, "CHECK_INTERVAL", 3)
    _, fast = both(train())

    class Wrong:
        def encode_no_normalize(self, text):
            return np.array([5, 6], np.uint32)

    fast._engine = Wrong()
    fast.encode("one")
    fast.encode("two")
    with pytest.raises(EncoderMismatch, match="three"):
        fast.encode("three")


def test_memory_is_given_back_without_changing_ids(train, texts, monkeypatch):
    processor, fast = both(train())
    monkeypatch.setattr(fast_sentencepiece, "REBUILD_CHARACTERS", 20_000)
    engines = set()
    for text in texts[:30]:
        assert fast.encode(text).tolist() == processor.encode(text)
        engines.add(id(fast._engine))
        assert fast._characters <= 20_000 or len(text) > 19_000
    assert len(engines) > 1

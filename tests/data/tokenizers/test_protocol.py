"""What holds for tokenizers of every kind."""

from engine.testing.tokenizers import NASTY_TEXTS
from tests.data.tokenizers.examples import TEXTS


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

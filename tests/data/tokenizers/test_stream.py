"""Text from ids that arrive one by one."""

import random

from engine.data.tokenizers.stream import stream_text
from tests.data.tokenizers.examples import TEXTS


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

"""Texts and files for tests of tokenizers."""

import json
import random
from itertools import pairwise

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = ["def f(x):\n    return x\n", "a  b\tc", "naïve 中文 👩‍👩‍👧", "\x00\x7f"]
PARTS = ["<s>", "</s>", "<unk>", "<s>x", "<|im_start|>", "<|im_start|>x", "<|im_end|>", "<|im_en", "\n\n", "aaaa"]


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


def spelled_out(count):
    choose = random.Random(0)
    yield from ("", " ", "<s>", "</s> ", " <s>a", "a<s> b")
    for _ in range(count):
        yield "".join(choose.choices(PARTS, k=choose.randrange(20)))


def assert_spans_follow_the_text(text, ids, spans):
    assert len(ids) == len(spans)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert all(before <= after for before, after in pairwise(spans) if before[0] != after[0])

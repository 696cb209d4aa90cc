"""Texts and files for tests of tokenizers."""

import base64
import json
import random
import unicodedata
from functools import cache
from itertools import pairwise

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from engine.data.tokenizers.byte_level_bpe import CL100K, O200K, byte_letters
from engine.testing.tokenizers import NASTY_TEXTS, standard_library_texts

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


def byte_ranks(size=700):
    """Tokens of a byte-level BPE in the order in which they merge, trained on the standard library."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*standard_library_texts(100_000), *NASTY_TEXTS], trainer)
    byte_of = {chr(letter): byte for byte, letter in byte_letters().items()}
    merges = json.loads(backend.to_str())["model"]["merges"]
    merged = [bytes(byte_of[letter] for letter in "".join(pair)) for pair in merges]
    return list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *merged]))


def write_tekken(path, ranks, *, count=30, special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), drop=5):
    """A `tekken.json` whose vocabulary leaves out the last `drop` tokens, as the published ones do."""
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, token in enumerate(ranks)
    ]
    content = {
        "config": {
            "pattern": O200K.replace("{1,3}", ""), "num_vocab_tokens": len(ranks), "version": "v7",
            "default_vocab_size": len(ranks) + count - drop, "default_num_special_tokens": count,
        },
        "vocab": entries,
    }  # fmt: skip
    if special is not None:
        content["special_tokens"] = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(special)]
    path.write_text(json.dumps(content))
    return path


def write_tiktoken(path, ranks):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    return path


def hostile_texts(count, seed=0):
    """Code, characters of all scripts, whitespace of all kinds, contractions in odd letters, and runs."""
    choose, (assigned, code) = random.Random(seed), _characters_and_code()
    words = [
        "don't",
        "WE'LL",
        "'ſ",
        "K's",
        "ǅ",
        "ßẞ",
        "①②",
        "½",
        "४५६",
        "12345678",
        "Ⅷ",
        "é",
        "ﬁ",
        "İi",
        "👩\u200d👩\u200d👧",
        "中文",
        "한국어",
        "العربية",
        "हिन्दी",
        "//",
        "====",
        "aaaaaaa",
    ]
    words += list(" \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2007\u200b\u2028\u202f\u3000\ufeff")
    for i in range(count):
        if i % 4 == 0:
            text = choose.choice(code)
            start = choose.randrange(len(text) or 1)
            yield text[start : start + choose.randrange(500)]
        elif i % 4 == 1:
            yield "".join(choose.choices(assigned, k=choose.randrange(1, 40)))
        elif i % 4 == 2:
            yield "".join(choose.choices(words, k=choose.randrange(1, 40)))
        else:
            yield "".join(choose.choice("a1 \n-'sé") * choose.randrange(1, 20) for _ in range(choose.randrange(1, 9)))


@cache
def _characters_and_code():
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn")]
    return assigned, list(standard_library_texts(200_000))

"""Texts and small tokenizer models for tests and benchmarks, built from files that every Python installation has."""

import io
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NASTY_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "\r\n\r",
    "\x00",
    "a\x00b",
    "\x01\x1f\x7f\x80\x85\x9f",
    "\ufeffa",
    "\ufffd",
    "\u2028\u2029\u3000\u00a0\u200b\u200d",
    "e\u0301 a\u0308\u0323 \u0301",
    "ﬁ ① ½ Ａ ℃ ™",
    "中文字 日本語かな 한국어 ไทย العربية עברית",
    "👩‍👩‍👧 🏳️‍🌈 😀" * 20,
    "\U0010ffff\U000e0001\uffff\ue000\ud7ff",
    "\u2581",
    "a\u2581\u2581 b \u2581",
    "<s></s><unk><pad><0x0A> </s> [INST]",
    " leading and trailing ",
    "a" * 5000,
    "ab" * 3000,
    "=" * 4000 + " " + "-" * 77,
    " " * 3000 + "x",
    "\n" * 2000,
    "\t\t  \t x \n\n   y" * 50,
    "1234567890 3.14159e-10 0xDEADBEEF " * 30,
    "Supercalifragilisticexpialidocious" * 100,
    "".join(map(chr, range(0x250))),
)


def standard_library_texts(limit_bytes: int | None = None) -> Iterator[str]:
    """Yield the modules of Python's standard library in a fixed order, then their docstrings."""
    docstrings: list[str] = []
    used = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = _read(path)
        if text is None or "site-packages" in path.parts:
            continue
        yield text
        docstrings += re.findall(r'"""(.+?)"""', text, re.DOTALL)
        used += len(text)
        if limit_bytes is not None and used >= limit_bytes:
            break
    yield from docstrings


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, model_type: str = "bpe", **options: Any) -> bytes:
    """Train a SentencePiece model with the usual settings of language models; `options` are passed to the trainer."""
    from sentencepiece import SentencePieceTrainer

    usual = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        minloglevel=2,
        **{**usual, **options},
    )
    return model.getvalue()


def write_chatml_tokenizer(folder: Path) -> Path:
    """Write a `tokenizer.json` with an end-of-document token, ChatML's tokens (ids 0, 1, 2) and single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def _read(path: Path) -> str | None:
    """Read a file as UTF-8; None for the few modules that test encodings."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None

"""Short texts on which two tokenizers that should be the same are compared."""

from collections.abc import Iterable, Iterator

PLAIN_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? 3.14159e-10",
    " a leading space", "  two leading spaces, a trailing space ", "two  spaces   three\t\ta tab",
    "\nlines\n\n\nand lines\r\n", "def f(x: int) -> str:\n    return {'a': [x, 0xFF]}[\"a\"]  # done\n",
    "naïve café, Straße — “quoted” …", "中文字符 日本語 한국어 العربية ไทย", "🙂👩‍👩‍👧", "[INST] <<SYS>> [/INST] ###",
    "aaaa====----",
)  # fmt: skip
MAX_SPECIAL = 16


def probe_texts(special_tokens: Iterable[str]) -> Iterator[str]:
    """Yield plain texts, then texts around each of the first special tokens, with and without spaces."""
    yield from PLAIN_TEXTS
    for _, token in zip(range(MAX_SPECIAL), special_tokens, strict=False):
        yield from (f"{token}a", f"{token} a{token}  b\n{token}\nc d {token} ", f"a {token} b{token}{token}c")

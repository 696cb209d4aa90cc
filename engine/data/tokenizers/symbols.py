"""Encodes special tokens spelled out in a text, for tokenizers whose encoder treats them as plain text."""

import re
from collections.abc import Callable, Iterable, Mapping

from engine.data.tokenizers.protocol import Span

Encode = Callable[[str], tuple[list[int], list[Span]]]


def split_pattern(symbols: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern whose `split` splits a text at symbols and keeps them; the longest symbol wins."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(symbols, key=len, reverse=True)))})")


def encode_with_symbols(
    text: str,
    pattern: re.Pattern[str],
    symbols: Mapping[str, int],
    encode: Encode,
    encode_after: Encode | None = None,
) -> tuple[list[int], list[Span]]:
    """Encode a text: symbols become their ids, `encode` encodes the text between them. Return ids and their spans.

    Args:
        pattern: `split_pattern(symbols)`.
        encode_after: encodes text after a symbol, if that differs from `encode`.
    """
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for part in pattern.split(text):
        if part in symbols:
            ids.append(symbols[part])
            spans.append((at, at + len(part)))
        elif part:
            part_ids, part_spans = (encode_after if at and encode_after else encode)(part)
            ids += part_ids
            spans += [(at + start, at + end) for start, end in part_spans]
        at += len(part)
    return ids, spans

"""A tokenizer without a model file, for tests and first runs: one id per byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.tokenizers.protocol import Ids, Span
from engine.data.tokenizers.symbols import encode_with_symbols, split_pattern

BYTES_END = "<|endoftext|>"  # the text of the end-of-document token


class ByteTokenizer:
    """A tokenizer with one id per byte of UTF-8 (256), and one for the end of document.

    Args:
        template: a chat template file to keep with it.
    """

    kind = "byte"
    encoder = "bytes"
    vocab_size = 257
    eod_id = 256
    bos_id: int | None = None
    adds_bos = False
    hash = "byte"
    note: str | None = None

    def __init__(self, template: Path | None = None) -> None:
        self.files = [] if template is None else [template]
        self.special_tokens = {BYTES_END: self.eod_id}
        self._pattern = split_pattern(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        return encode_with_symbols(text, self._pattern, self.special_tokens, self._encode_with_spans)

    def _encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        return self.encode(text), [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`, without the end of document."""
        return bytes(i for i in ids if i != self.eod_id).decode(errors="replace")

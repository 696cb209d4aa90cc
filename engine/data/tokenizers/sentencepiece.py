"""Loads tokenizers from a SentencePiece model file (`tokenizer.model`)."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.tokenizers.fast_sentencepiece import FastSentencePiece, UnsupportedModel
from engine.data.tokenizers.files import (
    adds_bos,
    companions,
    content_hash,
    named_tokens,
    read_tokenizer_file,
    read_tokenizer_json,
)
from engine.data.tokenizers.protocol import Ids, Span
from engine.data.tokenizers.sentencepiece_model import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    fields_of,
    piece_of,
    prefixes_parts,
    submessage,
)
from engine.data.tokenizers.symbols import encode_with_symbols, split_pattern
from engine.errors import ConfigError

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec {add_dummy_prefix: false}


class SentencePieceTokenizer:
    """A tokenizer from a SentencePiece model. `encode` treats control symbols in a text as plain text.

    Attributes:
        prefix_parts: whether `encode_special` puts the dummy prefix (a space) in front of every text between control
            symbols, as the references of Llama 2 and of Mistral before version 3 do, or only in front of the whole
            text; see `prefixes_parts`.
        symbols: ids of the pieces that `encode_special` finds in a text: special tokens and the unknown token.

    Args:
        path: the model file.
        fast: use gigatoken in `encode_batch` if it gives the same ids; see `fast_sentencepiece`.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, *, fast: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = read_tokenizer_file(path)
        try:
            self._processor = SentencePieceProcessor(model_proto=self._model)
        except RuntimeError:
            raise ConfigError(
                f"{path} ({len(self._model):,} bytes) is neither a SentencePiece model nor a tokenizer.json, or damaged"
            ) from None
        self._use_fast = fast
        self.vocab_size: int = self._processor.vocab_size()
        self.hash = content_hash(self._model)
        self.files = [path, *companions(path)]
        fields = list(fields_of(self._model))
        pieces = [piece_of(value) for number, value in fields if number == 1]
        roles, named = named_tokens(path)
        self.special_tokens = {
            piece.text: i
            for i, piece in enumerate(pieces)
            if piece.type == CONTROL or (piece.text in named and piece.type != UNKNOWN)
        }
        self.symbols = self.special_tokens | {p.text: i for i, p in enumerate(pieces) if p.type == UNKNOWN}
        self.eod_id: int = self.special_tokens.get(roles.get("eos_token", ""), self._processor.eos_id())
        if self.eod_id < 0:
            raise ConfigError(f"{path} has no end-of-sentence piece, which ends documents; train it with eos_id >= 0")
        begin = self.special_tokens.get(roles.get("bos_token", ""), self._processor.bos_id())
        self.bos_id: int | None = begin if begin >= 0 else None
        self.adds_bos = begin >= 0 and adds_bos(path)
        legacy = read_tokenizer_json(path.with_name("tokenizer_config.json")).get("legacy") is not False
        self.prefix_parts = prefixes_parts(fields, legacy)
        self.note: str | None = None
        self._pattern = split_pattern(self.symbols)
        self._sizes = _piece_sizes(self._model)

    @cached_property
    def _fast(self) -> FastSentencePiece | str:
        """The fast encoder, or the reason for not using it."""
        if not self._use_fast:
            return "as requested"
        try:
            return FastSentencePiece(self._processor, self._model)
        except UnsupportedModel as reason:
            return str(reason)

    @property
    def encoder(self) -> str:
        return f"sentencepiece ({self._fast})" if isinstance(self._fast, str) else "gigatoken, checked by sentencepiece"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode many texts.

        Raises:
            EncoderMismatch: a check found that the fast encoder gives different ids.
        """
        fast = self._fast
        if isinstance(fast, str):
            return [np.array(self._processor.encode(text), np.int32) for text in texts]
        return [fast.encode(text) for text in texts]

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        """Encode as `Tokenizer` says. Text between control symbols is encoded separately, as by a `tokenizer.json`."""
        after = None if self.prefix_parts else partial(self._encode_with_spans, processor=self._without_prefix)
        return encode_with_symbols(text, self._pattern, self.symbols, self._encode_with_spans, after)

    @cached_property
    def _without_prefix(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._model + NO_DUMMY_PREFIX)

    def _encode_with_spans(self, text: str, processor: Any = None) -> tuple[list[int], list[Span]]:
        processor = processor or self._processor
        content = text.encode()
        # characters that start at or before each byte
        characters = np.cumsum((np.frombuffer(content, np.uint8) & 0xC0) != 0x80)
        if self._sizes is not None:
            ids: list[int] = processor.encode(text)
            ends = np.cumsum(self._sizes[ids])
            ends -= ends[-1] - len(content)  # the dummy prefix space is not a byte of the text
            starts = np.concatenate(([0], ends[:-1]))
            if -1 <= ends[0] - self._sizes[ids[0]] <= 0:
                ends = np.maximum(ends, 1)
                return ids, list(zip((characters[starts] - 1).tolist(), characters[ends - 1].tolist(), strict=True))
        message = processor.encode(text, out_type="serialized_proto")  # available in all versions
        pieces = [dict(fields_of(value)) for number, value in fields_of(message) if number == 2]
        before = [*(characters - 1).tolist(), len(text)]  # offsets are in bytes
        spans = [(before[piece.get(4, 0)], before[piece.get(5, 0)]) for piece in pieces]
        return [piece.get(2, 0) for piece in pieces], _fill_empty(spans)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text


def _fill_empty(spans: list[Span]) -> list[Span]:
    """Replace empty spans by the next span's first character: SentencePiece assigns a character to its last byte."""
    following: Span | None = None
    for i in range(len(spans) - 1, -1, -1):
        start, end = spans[i]
        if start < end:
            following = spans[i]
        elif following is not None:
            spans[i] = (following[0], following[0] + 1)
    return spans


def _piece_sizes(model: bytes) -> npt.NDArray[np.int64] | None:
    """Return the bytes of text per id; None if the model normalizes text or may produce unknown pieces."""
    fields = list(fields_of(model))
    normalizer = submessage(fields, 3)
    if normalizer.get(2) or normalizer.get(4, 1) or not submessage(fields, 2).get(35):  # rules, spaces, byte fallback
        return None
    pieces = [piece_of(value) for number, value in fields if number == 1]
    return np.array([1 if piece.type == BYTE else len(piece.text.replace(SPACE, " ").encode()) for piece in pieces])

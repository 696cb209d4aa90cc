"""Loads tokenizers from a SentencePiece model file (`tokenizer.model`)."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.tokenizers.fast_sentencepiece import FastSentencePiece, UnsupportedModel
from engine.data.tokenizers.files import companions, content_hash, read_tokenizer_file
from engine.data.tokenizers.protocol import Ids, Span
from engine.data.tokenizers.sentencepiece_model import BYTE, CONTROL, SPACE, UNKNOWN, fields_of, piece_of, submessage
from engine.data.tokenizers.symbols import encode_with_symbols, split_pattern
from engine.errors import ConfigError


class SentencePieceTokenizer:
    """A tokenizer from a SentencePiece model. `encode` treats control symbols in a text as plain text.

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
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise ConfigError(f"{path} has no end-of-sentence piece, which ends documents; train it with eos_id >= 0")
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.hash = content_hash(self._model)
        self.files = [path, *companions(path)]
        pieces = [piece_of(value) for number, value in fields_of(self._model) if number == 1]
        self.special_tokens = {piece.text: i for i, piece in enumerate(pieces) if piece.type == CONTROL}
        self._added = {piece.text: i for i, piece in enumerate(pieces) if piece.type in (CONTROL, UNKNOWN)}
        self._pattern = split_pattern(self._added)
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
        return encode_with_symbols(text, self._pattern, self._added, self._encode_with_spans)

    def _encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        content = text.encode()
        # characters that start at or before each byte
        characters = np.cumsum((np.frombuffer(content, np.uint8) & 0xC0) != 0x80)
        if self._sizes is not None:
            ids: list[int] = self._processor.encode(text)
            ends = np.cumsum(self._sizes[ids])
            ends -= ends[-1] - len(content)  # the dummy prefix space is not a byte of the text
            starts = np.concatenate(([0], ends[:-1]))
            if -1 <= ends[0] - self._sizes[ids[0]] <= 0:
                ends = np.maximum(ends, 1)
                return ids, list(zip((characters[starts] - 1).tolist(), characters[ends - 1].tolist(), strict=True))
        message = self._processor.encode(text, out_type="serialized_proto")  # available in all versions
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

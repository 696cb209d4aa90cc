"""SentencePiece BPE models through `gigatoken`: the same ids, ten times as fast and more.

SentencePiece runs its merges over a whole document at once. gigatoken cuts the text where no piece of the
vocabulary can lie across the cut, and remembers how each part was encoded: the same result, mostly by look-up.
SentencePiece still normalises the text, so its many rules have one implementation. Because another program's
ids are not believed, a model is taken only when its kind is one that both define alike, a self-test over the
whole vocabulary passes, and one document in `CHECK_INTERVAL` is encoded by both.

Rejected: `kitoken` (only twice as fast as SentencePiece; wrong ids with normalisation rules, and an abort of
the whole process on some texts); gigatoken's own reading of the model (takes `</s>` in a text for its end).
"""

import json
import random
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import TriaxisError

CHECK_INTERVAL = 512  # documents; SentencePiece is so slow that this costs a few percent
REBUILD_CHARACTERS = 1 << 27  # gigatoken's memory of parts grows without bound, so it starts anew now and then
SPACE = "\u2581"  # what SentencePiece writes for a space
BPE = 2  # TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.type

Fields = list[tuple[int, Any]]  # of a protobuf message: (number, value)
Ids = npt.NDArray[np.integer[Any]]


class UnsupportedModel(Exception):
    """This model cannot be encoded the fast way; the text says why."""


class EncoderMismatch(TriaxisError):
    """The fast encoder gave other ids than SentencePiece did."""

    advice = "start again with the plain encoder"


class Piece(NamedTuple):
    """An entry of the vocabulary, as the model file has it."""

    text: str
    score: float
    type: int


class FastSentencePiece:
    """Encodes as `processor` does.

    Args:
        processor: a `SentencePieceProcessor`.
        model: the bytes that it was made from.

    Raises:
        UnsupportedModel: gigatoken is absent, the model is of another kind, or the self-test failed.
    """

    def __init__(self, processor: Any, model: bytes) -> None:
        try:
            import gigatoken
        except ImportError:
            raise UnsupportedModel("gigatoken is not installed: pip install 'triaxis[hf]'") from None
        fields = list(_fields(model))
        pieces = _supported_pieces(fields)
        self._processor = processor
        self._normalize = _normalization(fields) or processor.normalize
        self._make = gigatoken.Tokenizer.from_json
        self._definition = json.dumps(_definition(pieces))
        self._symbols = _any_of(piece.text for piece in pieces if piece.type == USER_DEFINED)
        self._count = 0
        self._rebuild()
        self._self_test(pieces)

    def encode(self, text: str) -> Ids:
        """The ids of `text`.

        Raises:
            EncoderMismatch: this text was sampled for the check, and SentencePiece gave other ids.
        """
        ids = self._encode(text)
        self._count += 1
        if self._count % CHECK_INTERVAL == 0:
            self._compare(text, ids)
        return ids

    def _encode(self, text: str) -> Ids:
        normalized = self._normalize(text)
        if self._symbols is not None and self._symbols.search(normalized):
            return np.array(self._processor.encode(text), np.uint32)  # it cuts these symbols out first
        self._characters += len(normalized)
        if self._characters > REBUILD_CHARACTERS:
            self._rebuild()
        ids: Ids = self._engine.encode_no_normalize(normalized)
        return ids

    def _compare(self, text: str, ids: Ids) -> None:
        expected = self._processor.encode(text)
        if ids.tolist() != expected:
            raise EncoderMismatch(f"gigatoken encodes otherwise than SentencePiece a text that starts {text[:60]!r}")

    def _rebuild(self) -> None:
        self._engine: Any = self._make(self._definition).backend
        self._characters = 0

    def _self_test(self, pieces: list[Piece]) -> None:
        try:
            for text in self_test_texts(piece.text for piece in pieces):
                self._compare(text, self._encode(text))
        except EncoderMismatch as error:
            raise UnsupportedModel(f"self-test failed: {error}") from None


def self_test_texts(pieces: Iterable[str]) -> Iterator[str]:
    """Every piece in two orders, runs of every length, and what tokenizers stumble over."""
    words = [piece.replace(SPACE, " ") for piece in pieces]
    yield "".join(words)
    random.Random(0).shuffle(words)
    yield "".join(words)
    for character in " \t\n-=#a0é中":
        yield "".join(character * length + "x" for length in range(70))
    yield from (" " * length for length in range(40))
    yield "a\x00b\x1f\x7f\x85\r\n\r\u00a0\u2028\u3000\ufeff\u200b e\u0301 ﬁ ½ Ａ 한국어 日本語 \u2581\u2581x \u2581"
    yield "👩‍👩‍👧 🏳️‍🌈 \U0010ffff \ufffd \ue000 <s> </s> <unk> <0x0A> [INST]"


def _supported_pieces(fields: Fields) -> list[Piece]:
    """The vocabulary, when the model is of a kind that both programs define alike.

    Raises:
        UnsupportedModel: it is of another kind.
    """
    pieces = [_piece(value) for number, value in fields if number == 1]
    trainer, normalizer = _message(fields, 2), _message(fields, 3)
    types = {piece.type for piece in pieces}
    ordinary = [piece for piece in pieces if piece.type in (NORMAL, USER_DEFINED)]
    scores = Counter(piece.score for piece in ordinary if piece.type == NORMAL and piece.text.strip(SPACE))
    obstacles = {
        "it is not a BPE model": trainer.get(3) != BPE,
        "it has no byte fallback": not trainer.get(35),
        "it writes spaces behind words": bool(trainer.get(24)),
        "it does not escape spaces": normalizer.get(5) == 0,
        "it has unused pieces": UNUSED in types,
        "a piece has a space inside": any(SPACE in p.text.lstrip(SPACE) or " " in p.text for p in ordinary),
        "two pieces have the same score": max(scores.values(), default=0) > 1,
    }
    reasons = [reason for reason, holds in obstacles.items() if holds]
    if reasons:
        raise UnsupportedModel("; ".join(reasons))
    return pieces


def _normalization(fields: Fields) -> Callable[[str], str] | None:
    """What SentencePiece's normalisation comes to where the model has no rules; it takes a third of the time."""
    normalizer = _message(fields, 3)
    if normalizer.get(2) or normalizer.get(4, 1):  # character rules; removal of extra spaces
        return None
    prefix = SPACE if normalizer.get(3, 1) else ""
    return lambda text: prefix + text.replace(" ", SPACE) if text else text


def _definition(pieces: list[Piece]) -> dict[str, Any]:
    """The model as a Hugging Face `tokenizer.json`, without normalisation and special tokens."""
    model = {
        "type": "BPE",
        "unk_token": next(piece.text for piece in pieces if piece.type == UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {piece.text: i for i, piece in enumerate(pieces)},
        "merges": _merges({piece.text: piece.score for piece in pieces if piece.type == NORMAL}),
    }
    steps = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **steps, "model": model}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, in SentencePiece's order: best score of the result first.

    Runs of spaces may share a score; SentencePiece then merges from the left, as longest left part first does.
    """
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))


def _any_of(symbols: Iterable[str]) -> re.Pattern[str] | None:
    pattern = "|".join(map(re.escape, symbols))
    return re.compile(pattern) if pattern else None


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def _message(fields: Fields, number: int) -> dict[int, Any]:
    """The fields of the message in field `number`."""
    return {key: value for outer, message in fields if outer == number for key, value in _fields(message)}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message that SentencePiece has already accepted.

    The generated reader that comes with SentencePiece demands the newest protobuf package.
    https://protobuf.dev/programming-guides/encoding
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
        else:
            size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            yield number, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1

"""Reads a SentencePiece model file: its pieces, its settings, and the merges of a BPE model.

The file is a protobuf message. This module parses it in a few lines, because the generated reader in SentencePiece
requires the newest protobuf package.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

SPACE = "\u2581"  # SentencePiece's symbol for a space
BPE = 2  # TrainerSpec.model_type
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 40, 41, 42, 43  # fields of TrainerSpec
REMOVE_EXTRA_WHITESPACES = 4  # field of NormalizerSpec
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.type


Fields = list[tuple[int, Any]]  # of a protobuf message: (number, value)


class Piece(NamedTuple):
    """A vocabulary entry of the model file."""

    text: str
    score: float
    type: int


def prefixes_parts(fields: Fields, legacy: bool = True) -> bool:
    """Whether the dummy prefix stands in front of every text between control symbols, by default.

    Not if the model has control symbols for chat, such as `[INST]`, or `legacy` is false: templates then write the
    space. A model that removes extra spaces would remove that one, too.
    """
    trainer, normalizer = submessage(fields, 2), submessage(fields, 3)
    usual = {trainer.get(BOS_ID, 1), trainer.get(EOS_ID, 2), trainer.get(PAD_ID, -1)}
    pieces = [piece_of(value) for number, value in fields if number == 1]
    has_chat_symbols = any(piece.type == CONTROL and i not in usual for i, piece in enumerate(pieces))
    return bool(normalizer.get(REMOVE_EXTRA_WHITESPACES, 1)) or (legacy and not has_chat_symbols)


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces whose concatenation is a piece, in SentencePiece's order: best score first.

    Runs of spaces may have equal scores; SentencePiece then merges from the left, so the longest left part comes first.
    """
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))


def piece_of(message: bytes) -> Piece:
    """Parse a message ModelProto.SentencePiece; absent fields have protobuf's defaults."""
    fields = dict(fields_of(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def submessage(fields: Fields, number: int) -> dict[int, Any]:
    """Parse the message in field `number`."""
    return {key: value for outer, message in fields if outer == number for key, value in fields_of(message)}


def fields_of(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of the fields of a protobuf message that SentencePiece has accepted.

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
    """Decode a number of seven bits per byte, lowest first. Return the number and the offset after it."""
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1

"""Definitions of SentencePiece models as the content of a `tokenizer.json`, which `transformers` reads.

Ids differ in two cases, both caused by the library that reads the file: Unigram models resolve near-ties in long texts
in double precision, SentencePiece in single precision; and a few rare combining characters are normalized differently.
Alternative considered: the class `LlamaTokenizer`, which supports neither the model's normalization nor Unigram, and
gives different ids to a text that begins with a space.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.data.tokenizers.definition import TokenizerJson, added_token, tokenizer_json
from engine.data.tokenizers.sentencepiece_model import (
    BOS_ID,
    BPE,
    CONTROL,
    EOS_ID,
    NORMAL,
    PAD_ID,
    REMOVE_EXTRA_WHITESPACES,
    SPACE,
    UNK_ID,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    fields_of,
    merges,
    piece_of,
    prefixes_parts,
    submessage,
)
from engine.errors import ConfigError

FieldsByNumber = Mapping[int, Any]  # of a protocol buffer message, by number

UNIGRAM = 1
# field numbers of sentencepiece_model.proto
MODEL_TYPE, TREAT_WHITESPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35
PRECOMPILED_CHARSMAP, ADD_DUMMY_PREFIX = 2, 3


def sentencepiece_json(content: bytes, prefix_parts: bool | None = None) -> tuple[TokenizerJson, dict[str, str]]:
    """Return the `tokenizer.json` of a SentencePiece model, and its special tokens by role, such as `eos_token`.

    Args:
        prefix_parts: as in `SentencePieceTokenizer`.

    Raises:
        ConfigError: a model that Hugging Face's tokenizers cannot express.
    """
    fields = list(fields_of(content))
    pieces = [piece_of(value) for number, value in fields if number == 1]
    trainer, normalizer = submessage(fields, 2), submessage(fields, 3)
    if prefix_parts is None:
        prefix_parts = prefixes_parts(fields)
    if trainer.get(MODEL_TYPE, UNIGRAM) not in (UNIGRAM, BPE) or trainer.get(TREAT_WHITESPACE_AS_SUFFIX):
        raise ConfigError("the tokenizer is neither a BPE nor a Unigram model with spaces in front of words")
    added = [
        added_token(i, piece.text, special=piece.type == CONTROL)
        for i, piece in enumerate(pieces)
        if piece.type in (UNKNOWN, CONTROL)
    ]
    decoders: list[TokenizerJson] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.get(ADD_DUMMY_PREFIX, 1):
        decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    tokenizer = tokenizer_json(
        _model(trainer, pieces),
        added,
        {"type": "Sequence", "normalizers": list(_normalizers(normalizer, prefix_parts))},
        _splits(normalizer, prefix_parts, [piece.text for piece in pieces if piece.type == USER_DEFINED]),
        {"type": "Sequence", "decoders": decoders},
    )
    ids = {
        "unk_token": trainer.get(UNK_ID, 0),
        "bos_token": trainer.get(BOS_ID, 1),
        "eos_token": trainer.get(EOS_ID, 2),
        "pad_token": trainer.get(PAD_ID, -1),
    }
    return tokenizer, {role: pieces[i].text for role, i in ids.items() if 0 <= i < len(pieces)}


def _model(trainer: FieldsByNumber, pieces: Sequence[Piece]) -> TokenizerJson:
    byte_fallback, unknown = bool(trainer.get(BYTE_FALLBACK)), trainer.get(UNK_ID, 0)
    if trainer.get(MODEL_TYPE, UNIGRAM) == UNIGRAM:
        vocab = [[piece.text, piece.score] for piece in pieces]
        return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback}
    return {
        "type": "BPE",
        "vocab": {piece.text: i for i, piece in enumerate(pieces)},
        "merges": merges({piece.text: piece.score for piece in pieces if piece.type == NORMAL}),
        "unk_token": pieces[unknown].text,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": True,  # after the split, user-defined symbols are separate words without merges
    }


def _normalizers(spec: FieldsByNumber, prefix_parts: bool) -> Iterator[TokenizerJson]:
    """Yield SentencePiece's steps in their order: character map, extra spaces, dummy prefix, spaces to `SPACE`."""
    if spec.get(PRECOMPILED_CHARSMAP):
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec[PRECOMPILED_CHARSMAP]).decode()}
    if spec.get(REMOVE_EXTRA_WHITESPACES, 1):
        yield {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if spec.get(ADD_DUMMY_PREFIX, 1) and prefix_parts:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _splits(spec: FieldsByNumber, prefix_parts: bool, symbols: list[str]) -> TokenizerJson | None:
    """Return the pre-tokenizer: the dummy prefix of the whole text, if no normalizer adds it to each part, then the
    split at user-defined symbols, longest first, so that no merge crosses them.

    No space is left here. So the first `Metaspace` puts one in front of the text, and only there, even if the text
    begins with a space; the second turns it into `SPACE`.
    """
    steps: list[TokenizerJson] = []
    if spec.get(ADD_DUMMY_PREFIX, 1) and not prefix_parts:
        steps = [
            {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}
            for replacement, scheme in ((" ", "first"), (SPACE, "never"))
        ]
    if symbols:
        longest_first = sorted((symbol.replace(" ", SPACE) for symbol in symbols), key=len, reverse=True)
        pattern = "|".join(re.escape(symbol) for symbol in longest_first)
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    if not steps:
        return None
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]

"""Writes tokenizer files that `transformers` loads offline and that give the same ids.

A SentencePiece model is converted to a `tokenizer.json`. Ids differ in two cases, both caused by the library that reads
the file: Unigram models resolve near-ties in long texts in double precision, SentencePiece in single precision; and a
few rare combining characters are normalized differently. Alternative considered: the class `LlamaTokenizer`, which
supports neither the model's normalization nor Unigram, and gives different ids to a text that begins with a space.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.huggingface.files import Json, read_json, write_json
from engine.checkpoint.storage import Storage
from engine.data.tokenizers.byte import BYTES_END
from engine.data.tokenizers.files import named_tokens
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer
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
from engine.errors import CheckpointError

FieldsByNumber = Mapping[int, Any]  # of a protocol buffer message, by number

PLAIN_CLASS, TOKENIZER_CONFIG = "PreTrainedTokenizerFast", "tokenizer_config.json"
UNIGRAM = 1
# field numbers of sentencepiece_model.proto
MODEL_TYPE, TREAT_WHITESPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35
PRECOMPILED_CHARSMAP, ADD_DUMMY_PREFIX = 2, 3


def write_tokenizer(files: Storage, target: Path, tokenizer_dir: Path | None, tokenizer: Tokenizer) -> None:
    """Copy the run's tokenizer files into `target`, and create the missing files that `transformers` needs.

    Args:
        tokenizer_dir: the checkpoint's tokenizer directory; None for a tokenizer without files (bytes).

    Raises:
        CheckpointError: an unknown kind of tokenizer, or a model that Hugging Face's tokenizers cannot express.
    """
    sources = sorted(tokenizer_dir.iterdir()) if tokenizer_dir else []
    for source in sources:
        sentencepiece = tokenizer.kind == "sentencepiece" and source.name == tokenizer.files[0].name
        path = target / ("tokenizer.model" if sentencepiece else source.name)
        if (
            source.name == TOKENIZER_CONFIG
            and (plain := _plain_config(config := read_json(source), tokenizer)) != config
        ):
            write_json(files, path, plain)
        else:
            files.copy(source, path)
    missing = {"tokenizer.json", TOKENIZER_CONFIG} - {source.name for source in sources}
    for name, content in _made_for_transformers(tokenizer).items() if missing else ():
        if name in missing:
            write_json(files, target / name, content)


def _plain_config(config: Json, tokenizer: Tokenizer) -> Json:
    """Return a `tokenizer_config.json` under which transformers reads `tokenizer.json` as it is.

    A model's own class, such as `LlamaTokenizer`, rebuilds the tokenizer by rules of its own; so does a missing class,
    in favor of the model's. Beginning and end of text are named if no file names them. `split_special_tokens` would
    read special tokens as text. transformers 5 writes a list of `extra_special_tokens`, for which 4 expects a table.
    """
    named = {**_text_ends(tokenizer), **named_tokens(tokenizer.files[0])[0]}
    ends = {role: named[role] for role in ("bos_token", "eos_token") if role in named and config.get(role) is None}
    dropped = ("auto_map", "legacy", "from_slow", "split_special_tokens")
    kept = {key: value for key, value in config.items() if key not in dropped}
    if isinstance(extra := kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = [*(kept.get("additional_special_tokens") or ()), *extra]
        del kept["extra_special_tokens"]
    return kept | ends | {"tokenizer_class": PLAIN_CLASS}


def _text_ends(tokenizer: Tokenizer) -> dict[str, str]:
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
    return {role: texts[i] for role, i in ends.items() if i in texts}


def _made_for_transformers(tokenizer: Tokenizer) -> dict[str, Json]:
    """Return file contents by name; no `tokenizer.json` for a tokenizer that was loaded from one.

    Raises:
        CheckpointError: an unknown kind of tokenizer, or a model that Hugging Face's tokenizers cannot express.
    """
    if tokenizer.kind == "huggingface":
        return {TOKENIZER_CONFIG: tokenizer_config(_text_ends(tokenizer))}
    if tokenizer.kind == "byte":
        pair = bytes_tokenizer()
    elif tokenizer.kind == "sentencepiece":
        assert isinstance(tokenizer, SentencePieceTokenizer)
        pair = sentencepiece_tokenizer(tokenizer.files[0].read_bytes(), tokenizer.prefix_parts)
    else:
        raise CheckpointError(
            f"a tokenizer of kind {tokenizer.kind!r} cannot be exported; expected byte, huggingface or sentencepiece"
        )
    return dict(zip(("tokenizer.json", TOKENIZER_CONFIG), pair, strict=True))


def bytes_tokenizer() -> tuple[Json, Json]:
    """Return `tokenizer.json` and `tokenizer_config.json` of the byte tokenizer: no merges, only byte fallback."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model: Json = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": None, "byte_fallback": True}
    added = [_added_token(256, BYTES_END, special=True)]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return _tokenizer(model, added, None, None, decoder), tokenizer_config({"eos_token": BYTES_END})


def sentencepiece_tokenizer(content: bytes, prefix_parts: bool | None = None) -> tuple[Json, Json]:
    """Return `tokenizer.json` and `tokenizer_config.json` of a SentencePiece model.

    Args:
        prefix_parts: as in `SentencePieceTokenizer`.

    Raises:
        CheckpointError: a model that Hugging Face's tokenizers cannot express.
    """
    fields = list(fields_of(content))
    pieces = [piece_of(value) for number, value in fields if number == 1]
    trainer, normalizer = submessage(fields, 2), submessage(fields, 3)
    if prefix_parts is None:
        prefix_parts = prefixes_parts(fields)
    if trainer.get(MODEL_TYPE, UNIGRAM) not in (UNIGRAM, BPE) or trainer.get(TREAT_WHITESPACE_AS_SUFFIX):
        raise CheckpointError("the tokenizer is neither a BPE nor a Unigram model with spaces in front of words")
    added = [
        _added_token(i, piece.text, special=piece.type == CONTROL)
        for i, piece in enumerate(pieces)
        if piece.type in (UNKNOWN, CONTROL)
    ]
    decoders: list[Json] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.get(ADD_DUMMY_PREFIX, 1):
        decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    tokenizer = _tokenizer(
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
    return tokenizer, tokenizer_config({role: pieces[i].text for role, i in ids.items() if 0 <= i < len(pieces)})


def tokenizer_config(special: Mapping[str, str]) -> Json:
    """Return a `tokenizer_config.json`; `special` maps variables such as `eos_token` to the texts of special tokens."""
    return {"tokenizer_class": PLAIN_CLASS, "clean_up_tokenization_spaces": False, **special}


def _tokenizer(model: Json, added: list[Json], normalizer: Json | None, split: Json | None, decoder: Json) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _added_token(i: int, content: str, *, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **flags}


def _model(trainer: FieldsByNumber, pieces: Sequence[Piece]) -> Json:
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


def _normalizers(spec: FieldsByNumber, prefix_parts: bool) -> Iterator[Json]:
    """Yield SentencePiece's steps in their order: character map, extra spaces, dummy prefix, spaces to `SPACE`."""
    if spec.get(PRECOMPILED_CHARSMAP):
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec[PRECOMPILED_CHARSMAP]).decode()}
    if spec.get(REMOVE_EXTRA_WHITESPACES, 1):
        yield {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if spec.get(ADD_DUMMY_PREFIX, 1) and prefix_parts:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _splits(spec: FieldsByNumber, prefix_parts: bool, symbols: list[str]) -> Json | None:
    """Return the pre-tokenizer: the dummy prefix of the whole text, if no normalizer adds it to each part, then the
    split at user-defined symbols, longest first, so that no merge crosses them.

    No space is left here. So the first `Metaspace` puts one in front of the text, and only there, even if the text
    begins with a space; the second turns it into `SPACE`.
    """
    steps: list[Json] = []
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

"""The ids of special tokens that `config.json` and `generation_config.json` have, for generation with the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.huggingface.files import GENERATION_CONFIG, Json, read_json, write_json
from engine.checkpoint.storage import Storage
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.find import find_template
from engine.data.tokenizers.files import named_tokens
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end generation: the tokenizer's end of document, and `eos_token_id` (a number or a list) of
    the generation_config.json next to the tokenizer files, if any.

    Raises:
        CheckpointError: that file is invalid.
    """
    ids = {tokenizer.eod_id}
    for path in {file.with_name(GENERATION_CONFIG) for file in tokenizer.files}:
        if path.is_file():
            ids |= _end_ids(path, tokenizer.vocab_size)
    return frozenset(ids)


def _end_ids(path: Path, vocab_size: int) -> set[int]:
    named = read_json(path).get("eos_token_id")
    if named is None:
        return set()
    if not _are_ids(named, vocab_size):
        raise CheckpointError(f"{path}: eos_token_id = {named!r}; expected ids from 0 to {vocab_size - 1}")
    return set(named) if isinstance(named, list) else {named}


def imported_ids(config: Mapping[str, Any], vocab_size: int) -> Json:
    """Return the ids of special tokens in a `config.json`, by key; what is no id of the vocabulary is left out."""
    return {key: config[key] for key in TOKEN_IDS if _are_ids(config.get(key), vocab_size)}


def token_ids(tokenizer: Tokenizer | None, imported: Mapping[str, Any], vocab_size: int) -> Json:
    """Return beginning, end and padding for an exported `config.json`: the tokenizer's, else those of the import.

    An id of padding for which the embedding has no row is left out: transformers 4 would not load the model.
    """
    ids = {key: imported.get(key) for key in TOKEN_IDS}
    if tokenizer is None:
        return ids
    named = named_tokens(tokenizer.files[0])[0] if tokenizer.files else {}
    pad_id = tokenizer.special_tokens.get(named.get("pad_token", ""))
    own = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": pad_id if _are_ids(pad_id, vocab_size) else None,
    }
    return ids | {key: value for key, value in own.items() if value is not None}


def write_generation_config(
    files: Storage, path: Path, base: Mapping[str, Any], tokenizer: Tokenizer | None, ids: Mapping[str, Any]
) -> None:
    """Write a `generation_config.json`: `base`, with the end of turn of the chat template among the ends.

    Args:
        base: the settings of the run's tokenizer or of the imported model.
        ids: those of `config.json`, for what `base` leaves open.
    """
    content = {**base, **{key: value for key, value in ids.items() if value is not None and base.get(key) is None}}
    if tokenizer is not None:
        ends = content["eos_token_id"]
        ends = list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *end_of_turn_ids(tokenizer)]))
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if content != base or not path.exists():
        files.remove(path)
        write_json(files, path, content)


def _are_ids(value: Any, vocab_size: int) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(type(one) is int and 0 <= one < vocab_size for one in values)


def end_of_turn_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the id that ends a turn of the tokenizer's chat template; empty if there is none."""
    try:
        return frozenset({ChatEncoder(tokenizer, find_template(tokenizer)).end_of_turn_id})
    except ConfigError:  # no template, or one that does not end turns with a special token
        return frozenset()

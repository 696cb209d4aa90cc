"""`generation_config.json`: the ids of the beginning and end of generated text."""

from pathlib import Path

from engine.checkpoint.huggingface.files import GENERATION_CONFIG, read_json, write_json
from engine.checkpoint.storage import Storage
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.find import find_template
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError


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
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(f"{path}: eos_token_id = {named!r}; expected ids from 0 to {vocab_size - 1}")
    return set(ids)


def write_generation_config(files: Storage, path: Path, tokenizer: Tokenizer | None) -> None:
    """Write beginning and end ids, including the end of turn, or add them to the file of the run's tokenizer."""
    before = read_json(path) if path.exists() else None
    content = dict(before or {})
    if tokenizer is not None:
        ends = content.get("eos_token_id", tokenizer.eod_id)
        ends = list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *end_of_turn_ids(tokenizer)]))
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if tokenizer.bos_id is not None:
            content.setdefault("bos_token_id", tokenizer.bos_id)
    if content != before:
        files.remove(path)
        write_json(files, path, content)


def end_of_turn_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the id that ends a turn of the tokenizer's chat template; empty if there is none."""
    try:
        return frozenset({ChatEncoder(tokenizer, find_template(tokenizer)).end_of_turn_id})
    except ConfigError:  # no template, or one that does not end turns with a special token
        return frozenset()

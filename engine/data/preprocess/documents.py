"""Parses pretraining documents from blocks of lines: JSON objects with texts, or plain text files.

An invalid line does not stop preprocessing: it becomes a `Reject` with file, line and reason.
"""

from collections.abc import Sequence
from typing import Any

import orjson

from engine.data.preprocess.blocks import LineBlock
from engine.data.preprocess.json_lines import parse_json
from engine.data.preprocess.records import FORMATS
from engine.data.preprocess.rejects import Reject

CONVERSATION_ADVICE = "; for fine-tuning preprocess it with task = sft"


def parse_block(block: LineBlock, keys: Sequence[str]) -> tuple[list[tuple[str, ...]], list[Reject]]:
    """Return the documents of a block, with one text per key, and its rejected lines. Blank lines are skipped."""
    if block.problem is not None:
        return [], [block.reject(block.first_line, block.problem)]
    parse = _parse_text if block.source.kind == "text" else _parse_line
    documents, rejects = [], []
    for number, line in block.numbered_lines():
        try:
            documents.append(parse(line, keys))
        except ValueError as error:
            rejects.append(block.reject(number, str(error), line))
    return documents, rejects


def _parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Parse one line. Raises ValueError, as `_parse_text` does, with the reason for rejecting the line."""
    try:
        record = parse_json(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object")
    for key in keys:
        if key not in record:
            has = ", ".join(map(repr, list(record)[:8])) or "none"
            raise ValueError(f"no key {key!r}; it has {has}{CONVERSATION_ADVICE * _is_conversation(record)}")
        if not isinstance(record[key], str):
            raise ValueError(f"key {key!r} holds a {type(record[key]).__name__}, expected text")
    return tuple(record[key] for key in keys)


def _is_conversation(record: dict[str, Any]) -> bool:
    """Whether a record has the keys of a conversation; see `records.py`."""
    return any(set(keys) <= record.keys() for name, keys in FORMATS.items() if name not in ("tokens", "text"))


def _parse_text(data: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        return (data.decode(),)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None

"""File names in a Hugging Face directory, and reading and writing of its JSON files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from engine.checkpoint.safetensors_file import read_file
from engine.checkpoint.storage import Storage
from engine.data.tokenizers.files import MODEL_FILES
from engine.errors import CheckpointError

Json = dict[str, Any]

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *MODEL_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", GENERATION_CONFIG,
)  # fmt: skip
_MAX_JSON_BYTES = 256 << 20


def read_json(path: Path) -> Json:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: missing, unreadable, larger than 256 MiB, or not an object.
    """
    try:
        content = orjson.loads(read_file(path, _MAX_JSON_BYTES))
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def write_json(files: Storage, path: Path, content: Mapping[str, Any]) -> None:
    """Write a new file, indented."""
    files.write(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Assign tensors, in order, to files of up to `shard_bytes` (or one larger tensor). Return names by file name."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}

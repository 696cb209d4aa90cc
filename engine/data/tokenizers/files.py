"""Finds and reads the files of a tokenizer: the model file and its companions."""

import json
from pathlib import Path
from typing import Any

import xxhash

from engine.errors import ConfigError

MODEL_FILES = (  # names to look for in a directory, in this order
    "tokenizer.model", "spiece.model", "tokenizer.json", "tekken.json", "vocab.json"
)  # fmt: skip
CONVERSION = (
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW) in transformers writes a tokenizer.json, which is read; "
    "many models on the Hub have one beside it"
)
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = (  # files that transformers keeps next to the model file
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE,
    "generation_config.json",
)  # fmt: skip

_MAX_BYTES = 1 << 28
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def find_model_file(path: Path) -> Path:
    """Return `path` itself, or the model file in the directory `path`.

    Raises:
        ConfigError: there is no model file, or more than one.
    """
    if path.is_file():
        return path
    found = [path / name for name in MODEL_FILES if (path / name).is_file()]
    found = found or sorted(path.glob("*.model")) or sorted(path.glob("*.tiktoken"))
    if not found:
        seen = "a directory without one" if path.is_dir() else "no such file"
        if (path / "vocab.txt").is_file():
            raise ConfigError(f"tokenizer {str(path)!r}: vocab.txt is of a kind that is not read here; {CONVERSION}")
        raise ConfigError(
            f"tokenizer {str(path)!r}: {seen}; expected a SentencePiece model, a tokenizer.json, a tekken.json, "
            f"a vocab.json with merges.txt, a tiktoken file, a directory that contains one, or `byte`"
        )
    if len(found) > 1 and found[0].name not in MODEL_FILES:
        raise ConfigError(f"tokenizer {str(path)!r}: holds {', '.join(file.name for file in found)}; name one of them")
    return found[0]


def companions(path: Path) -> list[Path]:
    """Return the existing companions of a model file."""
    return [path.with_name(name) for name in COMPANIONS if name != path.name and path.with_name(name).is_file()]


def read_tokenizer_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        ConfigError: the file cannot be read, or is much larger than any published one.
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes; files of tokenizers are read up to {_MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file does not exist.

    Raises:
        ConfigError: the file is unreadable or not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_tokenizer_file(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON, or nested too deeply: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def named_tokens(model_file: Path) -> tuple[dict[str, str], set[str]]:
    """Return the special tokens that the files beside a model file name: texts by role, such as `eos_token`, and all.

    As in transformers, `special_tokens_map.json` overrides `tokenizer_config.json`, unless the latter has
    `added_tokens_decoder`, which newer versions write.

    Raises:
        ConfigError: one of the files is invalid.
    """
    config = read_tokenizer_json(model_file.with_name("tokenizer_config.json"))
    older = read_tokenizer_json(model_file.with_name("special_tokens_map.json"))
    named = older | config if "added_tokens_decoder" in config else config | older
    roles = {role: text for role, value in named.items() if role.endswith("_token") and (text := _token_text(value))}
    extra = [named.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    texts = [_token_text(value) for values in extra if isinstance(values, list) for value in values]
    return roles, {*roles.values(), *filter(None, texts)}


def added_tokens(model_file: Path) -> dict[int, dict[str, Any]]:
    """Return the tokens that the files beside a model file add to its vocabulary: `content` and flags, by id.

    As in transformers: `added_tokens_decoder` of `tokenizer_config.json`, else `added_tokens.json`, which has no flags.

    Raises:
        ConfigError: one of the files is invalid.
    """
    config = model_file.with_name("tokenizer_config.json")
    try:
        if (decoder := read_tokenizer_json(config).get("added_tokens_decoder")) is not None:
            return {
                int(i): {flag: bool(token.get(flag)) for flag in TOKEN_FLAGS} | {"content": str(token["content"])}
                for i, token in sorted(decoder.items(), key=lambda item: int(item[0]))
            }
        older, (_, named) = read_tokenizer_json(model_file.with_name("added_tokens.json")), named_tokens(model_file)
        return {
            int(i): {"content": text, "special": text in named, "normalized": text not in named}
            for text, i in sorted(older.items(), key=lambda item: int(item[1]))
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the tokens that {config} or added_tokens.json adds are no ids with texts: {type(error).__name__}: {error}"
        ) from None


def adds_bos(model_file: Path, default: bool = False) -> bool:
    """Whether a text starts with the beginning-of-text token, as `tokenizer_config.json` beside a model file says."""
    return bool(read_tokenizer_json(model_file.with_name("tokenizer_config.json")).get("add_bos_token", default))


def _token_text(value: Any) -> str | None:
    """Return the text of a token, which is written as a text or as an object with a `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def content_hash(content: bytes) -> str:
    """Return the xxh3-64 hash in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(content)

"""Finds the chat template for a tokenizer: among the tokenizer's files, built in, or in a separate file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.compiled import SOURCE_LIMIT
from engine.data.chat.template import ChatTemplate
from engine.data.tokenizers.files import CHAT_TEMPLATE, named_tokens
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError

MAX_TOKEN_CHARACTERS = 1000  # of `bos_token` and the like, which a template may write any number of times
MAX_SPECIAL_TOKENS = 100


def find_template(tokenizer: Tokenizer, wanted: str | None = None) -> ChatTemplate:
    """Return the chat template for a tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        wanted: None for the template among the tokenizer's files, the name of a built-in template, or the path of a
            `.jinja` file.

    Raises:
        ConfigError: there is no such template, or its special tokens are not in the vocabulary.
        TemplateError: the template is unusable.
    """
    special_tokens_map, special = _special_tokens_map(tokenizer), tuple(tokenizer.special_tokens)
    if wanted is None:
        name, source = _own_template(tokenizer)
    elif wanted in BUILTIN:
        name, source = wanted, BUILTIN[wanted].source
        if missing := [token for token in BUILTIN[wanted].needs if token not in special]:
            raise ConfigError(
                f"chat template {wanted}: the vocabulary lacks {', '.join(missing)}; "
                f"templates that work with it: {', '.join(_fitting(tokenizer))}, or the path of a .jinja file"
            )
    else:
        name, source = wanted, _read_template(tokenizer, Path(wanted))
    return ChatTemplate(name, source, special_tokens_map, special)


def _own_template(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return name and source of the template among a tokenizer's files."""
    files = {path.name: path for path in tokenizer.files}
    if path := files.get(CHAT_TEMPLATE):
        return str(path), _read_template(tokenizer, path)
    path = files.get("tokenizer_config.json")
    found = _configuration(tokenizer).get("chat_template")
    if isinstance(found, list):
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ConfigError(
            f"the tokenizer comes with no chat template; name one with --chat-template: "
            f"{', '.join(_fitting(tokenizer))}, or the path of a .jinja file"
        )
    return str(path), found


def _read_template(tokenizer: Tokenizer, path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(SOURCE_LIMIT + 1)  # one more than allowed, to detect that it is too long
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"chat template {str(path)!r}: {reason}; expected a .jinja file or one of: {', '.join(_fitting(tokenizer))}"
        ) from None


def _fitting(tokenizer: Tokenizer) -> list[str]:
    """Return the built-in templates whose special tokens are in the vocabulary."""
    return [name for name, template in BUILTIN.items() if set(template.needs) <= tokenizer.special_tokens.keys()]


def _special_tokens_map(tokenizer: Tokenizer) -> dict[str, str]:
    """Return `bos_token`, `eos_token` ... as the tokenizer's files name them; by default its BOS and EOD."""
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
    named = {name: texts[i] for name, i in ids.items() if i is not None and i in texts}
    if tokenizer.files:
        named |= named_tokens(tokenizer.files[0])[0]
    _check_special_tokens(named)
    return named


def _check_special_tokens(named: Mapping[str, str]) -> None:
    longest = max(named, key=lambda name: len(named[name]), default="")
    if longest and len(named[longest]) > MAX_TOKEN_CHARACTERS:
        raise ConfigError(
            f"{longest} of tokenizer_config.json has {len(named[longest]):,} characters, "
            f"expected a token of at most {MAX_TOKEN_CHARACTERS:,}"
        )
    if len(named) > MAX_SPECIAL_TOKENS:
        raise ConfigError(f"tokenizer_config.json names {len(named):,} tokens, expected at most {MAX_SPECIAL_TOKENS}")


def _configuration(tokenizer: Tokenizer) -> dict[str, Any]:
    """Read `tokenizer_config.json`, which was checked when the tokenizer was loaded."""
    path = next((path for path in tokenizer.files if path.name == "tokenizer_config.json"), None)
    content: dict[str, Any] = json.loads(path.read_bytes()) if path else {}
    return content

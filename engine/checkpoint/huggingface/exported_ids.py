"""Checks that the tokenizer of a Hugging Face directory gives the ids that the run was trained on.

The files are read back by this package and, where it is installed, by `transformers`, as users of the export will read
them. Texts around special tokens and conversations are compared: an export whose weights are right and whose ids are
not is another model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.data.chat.errors import ConversationError
from engine.data.chat.find import find_template
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.probe import probe_texts
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError

_TURNS = [
    {"role": "user", "content": "How far is the mill?"},
    {"role": "assistant", "content": "Nine miles."},
    {"role": "user", "content": "And back?  \n(in km)"},
    {"role": "assistant", "content": "Nine more: 14.5 km"},
]
_CONVERSATIONS = (_TURNS, _TURNS[:1], [{"role": "system", "content": "Be brief."}, *_TURNS])


@dataclass(frozen=True)
class ComparedIds:
    """What was compared, and who read the directory; nobody if no reader is installed."""

    num_texts: int = 0
    num_conversations: int = 0
    readers: tuple[str, ...] = ()


def readers() -> list[str]:
    """Return the readers by which exported ids are checked: this package and, if they are installed, others."""
    return ["triaxis", *(name for name in ("transformers",) if find_spec(name) and find_spec("tokenizers"))]


def require_trained_ids(directory: Path, tokenizer: Tokenizer) -> ComparedIds:
    """Check that a directory's tokenizer files give the ids of the run's `tokenizer`.

    Raises:
        CheckpointError: names the text whose ids differ.
    """
    if find_spec("tokenizers") is None and tokenizer.kind != "sentencepiece":
        return ComparedIds()
    ours, texts = load_tokenizer(directory, fast=False), list(probe_texts(tokenizer.special_tokens))
    for text in texts:
        _compare("this package", text, tokenizer.encode_special(text)[0], ours.encode_special(text)[0])
    if "transformers" not in readers():
        return ComparedIds(len(texts), 0, ("triaxis",))
    chats = _compare_with(_transformers_tokenizer(directory), tokenizer, texts)
    return ComparedIds(len(texts), chats, ("triaxis", "transformers"))


def difference_in_transformers(directory: Path, tokenizer: Tokenizer) -> str | None:
    """Return how the ids that `transformers` gives with a directory differ from those of `tokenizer`, loaded from it.

    None if they are equal, and if it is not installed or cannot load the tokenizer. Tokenizers of some classes, such as
    `LlamaTokenizer`, it makes anew instead of reading `tokenizer.json`, by rules that differ between its versions.
    """
    if "transformers" not in readers():
        return None
    try:
        theirs = _transformers_tokenizer(directory)
    except CheckpointError:
        return None
    try:
        _compare_with(theirs, tokenizer, list(probe_texts(tokenizer.special_tokens)))
    except CheckpointError as difference:
        return str(difference)
    return None


def _compare_with(theirs: Any, tokenizer: Tokenizer, texts: list[str]) -> int:
    """Compare the ids of texts and conversations with those of a tokenizer of `transformers`; count the latter.

    Raises:
        CheckpointError: names the text whose ids differ.
    """
    chats = list(_chats(tokenizer))
    reader = f"transformers ({type(theirs).__name__})"
    for text in texts:
        _compare(reader, text, tokenizer.encode_special(text)[0], theirs.encode(text, add_special_tokens=False))
    for messages, text in chats:
        try:
            found = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        except Exception as error:  # a template can raise anything
            raise CheckpointError(f"transformers cannot render the chat template: {error}") from None
        _compare(reader, f"the conversation {text}", tokenizer.encode_special(text)[0], list(found))
    return len(chats)


def _chats(tokenizer: Tokenizer) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Yield conversations that the chat template of the tokenizer, if any, can render, with their texts."""
    try:
        template = find_template(tokenizer)
    except ConfigError:
        return
    for messages in _CONVERSATIONS:
        try:
            yield messages, template.render(messages, "all").text
        except (ConversationError, ConfigError):  # many templates have no system message
            continue


def _transformers_tokenizer(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # by kind of file, anything; also an installation that cannot be imported
        raise CheckpointError(f"transformers cannot load the tokenizer: {error}") from None


def _compare(reader: str, text: str, trained: list[int], found: list[int]) -> None:
    if found == trained:
        return
    first = next((i for i, (a, b) in enumerate(zip(trained, found, strict=False)) if a != b), len(trained))
    raise CheckpointError(
        f"the tokenizer of the directory, read by {reader}, gives other ids than the run's for {text!r}: "
        f"{found[first:][:5]} instead of {trained[first:][:5]} from position {first} on"
    )

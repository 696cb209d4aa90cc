"""Loads a tokenizer by name or path.

The kind is detected from the file's content, because users rename these files.
"""

from importlib.util import find_spec
from pathlib import Path

from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.byte_level_bpe import definition, is_sentencepiece
from engine.data.tokenizers.definition import Definition
from engine.data.tokenizers.files import (
    CHAT_TEMPLATE,
    CONVERSION,
    added_tokens,
    find_model_file,
    named_tokens,
    read_tokenizer_file,
)
from engine.data.tokenizers.huggingface import HuggingFaceTokenizer
from engine.data.tokenizers.probe import probe_texts
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer
from engine.data.tokenizers.sentencepiece_json import sentencepiece_json
from engine.errors import ConfigError


def load_tokenizer(spec: str | Path, *, fast: bool = True) -> Tokenizer:
    """Load the tokenizer `spec`: `byte`, a model file, or a directory with one.

    Model files are SentencePiece models, `tokenizer.json`, and the kinds of `byte_level_bpe`.

    Args:
        spec: the value of `data.tokenizer`.
        fast: for SentencePiece, use the fast encoder if possible.

    A directory may have a `tokenizer.json` beside another model file. They are compared; see `note` of the result.

    Raises:
        ConfigError: no tokenizer is found, or it is unusable.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if Path(spec).is_dir() and [path.name for path in Path(spec).iterdir()] == [CHAT_TEMPLATE]:
        return ByteTokenizer(Path(spec) / CHAT_TEMPLATE)  # in a checkpoint, the only file of this tokenizer
    path, in_directory = find_model_file(Path(spec)), Path(spec).is_dir()
    content, beside = read_tokenizer_file(path), path.with_name("tokenizer.json")
    if path == beside or (in_directory and beside.is_file() and not is_sentencepiece(content)):
        return _described(HuggingFaceTokenizer(beside), in_directory)
    if not is_sentencepiece(content):
        return HuggingFaceTokenizer(path, definition(path, content))
    tokenizer = SentencePieceTokenizer(path, fast=fast)
    if beside.is_file():
        return _choose(tokenizer, beside, in_directory)
    if any(tokenizer.symbols.get(token["content"]) != i for i, token in added_tokens(path).items()):
        return HuggingFaceTokenizer(path, Definition(sentencepiece_json(content, tokenizer.prefix_parts)[0], [path]))
    _require_named(tokenizer)
    return tokenizer


def _described(tokenizer: HuggingFaceTokenizer, in_directory: bool) -> HuggingFaceTokenizer:
    """Compare a `tokenizer.json` with the Tekken or tiktoken file beside it, which other programs read."""
    path = tokenizer.files[0]
    for other in map(path.with_name, ("tekken.json", "tokenizer.model") if in_directory else ()):
        if not other.is_file() or is_sentencepiece(content := read_tokenizer_file(other)):
            continue
        try:
            difference = _difference(HuggingFaceTokenizer(other, definition(other, content)), tokenizer)
        except ConfigError as error:
            difference = f"they are not compared: {error}"
        if difference:
            tokenizer.note = f"{path} is read, not {other.name}: {difference}"
    return tokenizer


def _require_named(tokenizer: SentencePieceTokenizer) -> None:
    """Check that the model has the tokens that the files beside it name: documents would end with another one."""
    roles, _ = named_tokens(tokenizer.files[0])
    for role in ("eos_token", "bos_token"):
        if role in roles and roles[role] not in tokenizer.special_tokens:
            raise ConfigError(
                f"tokenizer {str(tokenizer.files[0])!r} lacks {role} = {roles[role]!r}, which files beside it name, "
                f"and so does the list of added tokens; {CONVERSION}"
            )


def _choose(tokenizer: SentencePieceTokenizer, beside: Path, in_directory: bool) -> Tokenizer:
    """Return the SentencePiece tokenizer if it can give the ids of the `tokenizer.json` beside it, which is what
    `transformers` reads; else the latter, unless the model file was named. `note` says why.
    """
    model = tokenizer.files[0]
    if find_spec("tokenizers") is None:
        tokenizer.note = f"{model} is read; {beside.name} is not compared with it: tokenizers is not installed"
        return tokenizer
    other = HuggingFaceTokenizer(beside)
    differences = []
    for prefix_parts in (tokenizer.prefix_parts, not tokenizer.prefix_parts):
        tokenizer.prefix_parts = prefix_parts
        differences.append(_difference(tokenizer, other))
        if differences[-1] is None:
            return tokenizer
    tokenizer.prefix_parts = not tokenizer.prefix_parts
    if in_directory:
        other.note = f"{beside} is read, not {model.name}: {differences[0]}"
        return other
    _require_named(tokenizer)  # a checkpoint holds the model without the tokenizer.json
    tokenizer.note = f"{model} is read, as named, not {beside.name}: {differences[0]}"
    tokenizer.files = [file for file in tokenizer.files if file != beside]
    return tokenizer


def _difference(model: SentencePieceTokenizer | HuggingFaceTokenizer, other: HuggingFaceTokenizer) -> str | None:
    """Return the first difference between the ids of two tokenizers, on `probe_texts`; None if there is none."""
    if other.vocab_size > model.vocab_size:
        return f"{other.vocab_size - model.vocab_size} more ids"
    symbols = model.symbols if isinstance(model, SentencePieceTokenizer) else model.special_tokens
    if only := {name: i for name, i in other.special_tokens.items() if symbols.get(name) != i}:
        return f"{next(iter(only))!r} is a special token in tokenizer.json only"
    if missing := model.special_tokens.keys() - other.special_tokens.keys():
        return f"{min(missing)!r} is a special token in {model.files[0].name} only"
    if (model.bos_id, model.eod_id) != (other.bos_id, other.eod_id):
        return f"they begin and end a text with other tokens, {(model.bos_id, model.eod_id)} here"
    for text in probe_texts(model.special_tokens):
        if model.encode_special(text)[0] != other.encode(text):
            return f"they give other ids for {text!r}"
    return None

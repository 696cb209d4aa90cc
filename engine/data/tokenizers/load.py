"""Loads a tokenizer by name or path.

The kind is detected from the file's content, because users rename these files.
"""

from pathlib import Path

from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.files import CHAT_TEMPLATE, find_model_file, read_tokenizer_file, read_tokenizer_json
from engine.data.tokenizers.huggingface import HuggingFaceTokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer


def load_tokenizer(spec: str | Path, *, fast: bool = True) -> Tokenizer:
    """Load the tokenizer `spec`: `byte`, a SentencePiece model, a `tokenizer.json`, or a directory with one of these.

    Args:
        spec: the value of `data.tokenizer`.
        fast: for SentencePiece, use the fast encoder if possible.

    Raises:
        ConfigError: no tokenizer is found, or it is unusable.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if Path(spec).is_dir() and [path.name for path in Path(spec).iterdir()] == [CHAT_TEMPLATE]:
        return ByteTokenizer(Path(spec) / CHAT_TEMPLATE)  # in a checkpoint, the only file of this tokenizer
    path = find_model_file(Path(spec))
    if read_tokenizer_file(path)[:64].lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(path)
    tokenizer = SentencePieceTokenizer(path, fast=fast)
    extended = path.with_name("tokenizer.json")
    if Path(spec).is_dir() and extended.is_file() and _adds_ids(extended, tokenizer.vocab_size):
        return HuggingFaceTokenizer(extended)
    return tokenizer


def _adds_ids(path: Path, vocab_size: int) -> bool:
    """Whether a `tokenizer.json` has tokens that the model file lacks, such as those of a chat template."""
    added = read_tokenizer_json(path).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return any(isinstance(token.get("id"), int) and token["id"] >= vocab_size for token in tokens)

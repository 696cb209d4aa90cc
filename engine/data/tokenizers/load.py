"""Loading a tokenizer by its name or path.

The kind is read from the file's content, not from its name, because people rename these files.
"""

from pathlib import Path

from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.files import CHAT_TEMPLATE, find_model_file, read_tokenizer_file, read_tokenizer_json
from engine.data.tokenizers.huggingface import HuggingFaceTokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer


def load_tokenizer(spec: str | Path, *, fast: bool = True) -> Tokenizer:
    """The tokenizer that `spec` names: `byte`, a SentencePiece model, a `tokenizer.json`, or a directory with one.

    Args:
        spec: as in `data.tokenizer`.
        fast: SentencePiece only: allow the fast encoder.

    Raises:
        ConfigError: there is no tokenizer there, or it is unusable.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if Path(spec).is_dir() and [path.name for path in Path(spec).iterdir()] == [CHAT_TEMPLATE]:
        return ByteTokenizer(Path(spec) / CHAT_TEMPLATE)  # in a checkpoint, where it has no other file
    path = find_model_file(Path(spec))
    if read_tokenizer_file(path)[:64].lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(path)
    tokenizer = SentencePieceTokenizer(path, fast=fast)
    extended = path.with_name("tokenizer.json")
    if Path(spec).is_dir() and extended.is_file() and _adds_ids(extended, tokenizer.vocab_size):
        return HuggingFaceTokenizer(extended)
    return tokenizer


def _adds_ids(path: Path, vocab_size: int) -> bool:
    """Whether a `tokenizer.json` has tokens that the model file beside it lacks, such as those of a chat template."""
    added = read_tokenizer_json(path).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return any(isinstance(token.get("id"), int) and token["id"] >= vocab_size for token in tokens)

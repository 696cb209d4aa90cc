"""Loads tokenizers from a Hugging Face `tokenizer.json`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.data.tokenizers.files import companions, content_hash, read_tokenizer_file, read_tokenizer_json
from engine.data.tokenizers.protocol import Ids, Span
from engine.errors import ConfigError

END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Special tokens spelled out in a text become their ids, as in transformers."""

    kind = "huggingface"
    encoder = "tokenizers"

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
            from tokenizers import processors
        except ImportError:
            raise ConfigError(f"{path} needs the package tokenizers: pip install 'triaxis[hf]'") from None
        content = read_tokenizer_file(path)
        try:
            self._backend = Backend.from_buffer(content)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ConfigError(f"{path} is not a tokenizer.json or damaged: {error}") from None
        self._backend.no_truncation()  # some training scripts save truncation, which would silently cut documents
        self._backend.no_padding()
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # others trim spaces off the spans
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        end = self._special_id(path, "eos_token", END_NAMES)
        if end is None:
            raise ConfigError(
                f"{path} does not define the token that ends a document; "
                f"put a tokenizer_config.json with `eos_token` next to it"
            )
        self.eod_id = end
        self.bos_id = self._special_id(path, "bos_token", BEGIN_NAMES)
        self.hash = content_hash(content)
        self.files = [path, *companions(path)]
        added = self._backend.get_added_tokens_decoder().items()
        self.special_tokens: dict[str, int] = {token.content: i for i, token in added if token.special}

    def _special_id(self, path: Path, key: str, usual_names: Iterable[str]) -> int | None:
        """Return the id of the token under `key` in `tokenizer_config.json`, else of the first usual name that exists.

        Raises:
            ConfigError: the token under `key` is not in the vocabulary.
        """
        named = read_tokenizer_json(path.with_name("tokenizer_config.json")).get(key)
        name = named.get("content") if isinstance(named, dict) else named
        if name is not None:
            found: int | None = self._backend.token_to_id(str(name))
            if found is None:
                raise ConfigError(f"{key} = {name!r} of tokenizer_config.json is not in the vocabulary of {path}")
            return found
        special = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return next((special[name] for name in usual_names if name in special), None)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

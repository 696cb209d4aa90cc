"""Loads tokenizers from a Hugging Face `tokenizer.json`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.tokenizers.files import companions, content_hash, named_tokens, read_tokenizer_file
from engine.data.tokenizers.protocol import Ids, Span
from engine.errors import ConfigError

END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Special tokens spelled out in a text become their ids, as in transformers.

    Tokens that `tokenizer_config.json` or `special_tokens_map.json` name are special, whatever `tokenizer.json` says.
    """

    kind = "huggingface"
    encoder = "tokenizers"

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import AddedToken, processors
            from tokenizers import Tokenizer as Backend
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
        roles, named = named_tokens(path)
        added = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        known = {text: i for text in named if (i := self._backend.token_to_id(text)) is not None}
        self._backend.add_special_tokens(
            [AddedToken(text, normalized=False, special=True) for text in sorted(known.keys() - added.keys())]
        )
        flagged = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self.special_tokens: dict[str, int] = flagged | known
        for role in ("eos_token", "bos_token"):
            if role in roles and roles[role] not in known:
                raise ConfigError(
                    f"{role} = {roles[role]!r} of tokenizer_config.json or special_tokens_map.json is not in the "
                    f"vocabulary of {path}"
                )
        end = self._special_id(roles.get("eos_token"), END_NAMES)
        if end is None:
            raise ConfigError(
                f"{path} does not define the token that ends a document; "
                f"put a tokenizer_config.json with `eos_token` next to it"
            )
        self.eod_id = end
        self.bos_id = self._special_id(roles.get("bos_token"), BEGIN_NAMES)
        self.hash = content_hash(content)
        self.files = [path, *companions(path)]
        self.note: str | None = None

    def _special_id(self, named: str | None, usual_names: Sequence[str]) -> int | None:
        """Return the id of the named token, else of the first usual name that is a special token."""
        names = usual_names if named is None else (named,)
        return next((self.special_tokens[name] for name in names if name in self.special_tokens), None)

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

"""Loads tokenizers from a Hugging Face `tokenizer.json`, or from its content, built from files of other kinds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.tokenizers.definition import Definition, TokenizerJson
from engine.data.tokenizers.files import (
    added_tokens,
    adds_bos,
    companions,
    content_hash,
    named_tokens,
    read_tokenizer_file,
)
from engine.data.tokenizers.protocol import Ids, Span
from engine.errors import ConfigError

END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Special tokens spelled out in a text become their ids, as in transformers.

    Tokens that `tokenizer_config.json` or `special_tokens_map.json` name are special, whatever `tokenizer.json` says.
    Tokens that the former or `added_tokens.json` adds are part of the vocabulary.

    Attributes:
        built_from: the model files, if they are of another kind than `tokenizer.json`.

    Args:
        path: the model file.
        definition: the content of a `tokenizer.json` that stands for the model file, if that is of another kind.
    """

    kind = "huggingface"
    encoder = "tokenizers"

    def __init__(self, path: Path, definition: Definition | None = None) -> None:
        try:
            from tokenizers import AddedToken, processors
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ConfigError(f"{path} needs the package tokenizers: pip install 'triaxis[hf]'") from None
        self.built_from = definition.files if definition else []
        model_files = self.built_from or [path]
        content = b"".join(map(read_tokenizer_file, model_files))
        try:
            self._backend = Backend.from_buffer(json.dumps(definition.content).encode() if definition else content)
        except Exception as error:  # tokenizers raises bare Exceptions
            expected = "is damaged" if definition else "is not a tokenizer.json or damaged"
            raise ConfigError(f"{path} {expected}: {error}") from None
        self._backend.no_truncation()  # some training scripts save truncation, which would silently cut documents
        self._backend.no_padding()
        first = self._backend.encode("a").ids[:1]
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # others trim spaces off the spans
        self._add_tokens(path)
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
        if definition:
            self.adds_bos = self.bos_id is not None and adds_bos(path, definition.adds_bos)
        else:
            self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        self.hash = content_hash(content)
        beside = companions(path)  # of another kind, the tokenizer.json may be of other ids
        self.files = [*model_files, *(file for file in beside if file.name != "tokenizer.json" or not definition)]
        self.note: str | None = None

    def _add_tokens(self, path: Path) -> None:
        """Add the tokens that the files beside the model file name.

        Raises:
            ConfigError: a token does not get the id that is named for it.
        """
        from tokenizers import AddedToken

        tokens = added_tokens(path)
        self._backend.add_tokens([AddedToken(**token) for token in tokens.values()])
        for i, token in tokens.items():
            if (found := self._backend.token_to_id(token["content"])) != i:
                raise ConfigError(
                    f"{token['content']!r} has id {i} in the added tokens of tokenizer_config.json or "
                    f"added_tokens.json, but {found} in the vocabulary of {path}; correct one of them"
                )

    def to_json(self) -> TokenizerJson:
        """Return the content of a `tokenizer.json` for this tokenizer."""
        content: TokenizerJson = json.loads(self._backend.to_str())
        return content

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

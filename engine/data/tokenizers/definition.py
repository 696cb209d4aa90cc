"""The content of a `tokenizer.json`, built from files of other kinds."""

from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]


class Definition(NamedTuple):
    """A tokenizer as the content of a `tokenizer.json`, and the files that it was built from."""

    content: Json
    files: list[Path]


def tokenizer_json(
    model: Json, added: list[Json], normalizer: Json | None, split: Json | None, decoder: Json | None
) -> Json:
    """Return the content of a `tokenizer.json` without truncation, padding and post-processor."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def added_token(i: int, content: str, *, special: bool) -> Json:
    """Return an entry of `added_tokens`: a token that is found in the text before it is normalized and split."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **flags}

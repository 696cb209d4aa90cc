"""The content of a `tokenizer.json`, built from files of other kinds."""

from pathlib import Path
from typing import Any, NamedTuple

TokenizerJson = dict[str, Any]


class Definition(NamedTuple):
    """A tokenizer as the content of a `tokenizer.json`, and the files that it was built from.

    Attributes:
        adds_bos: whether its library starts a text with the beginning-of-text token, unless the files say otherwise.
    """

    content: TokenizerJson
    files: list[Path]
    adds_bos: bool = False


def tokenizer_json(
    model: TokenizerJson,
    added: list[TokenizerJson],
    normalizer: TokenizerJson | None,
    split: TokenizerJson | None,
    decoder: TokenizerJson | None,
) -> TokenizerJson:
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


def added_token(i: int, content: str, *, special: bool) -> TokenizerJson:
    """Return an entry of `added_tokens`: a token that is found in the text before it is normalized and split."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **flags}


def bos_processor(text: str, i: int) -> TokenizerJson:
    """Return the post-processor that starts every text with the token `text` of id `i`."""
    token = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}},
    }

"""Encodes conversations to token ids and target masks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.chat.compiled import Message
from engine.data.chat.template import ChatTemplate, Tools, TrainOn
from engine.data.tokenizers.protocol import Tokenizer

Spans = npt.NDArray[np.int64]  # [n, 2], start and end in characters


class ChatEncoder:
    """Encodes conversations with a chat template and a tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        template: for this tokenizer, as returned by `find_template`.

    Raises:
        TemplateError: the template does not end assistant turns with a special token.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.template = template
        self.end_of_turn_id = tokenizer.special_tokens[template.end_of_turn]
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
        self._texts = {i: text for text, i in tokenizer.special_tokens.items()}
        # characters of special tokens, 0 for others
        self._lengths = np.zeros(max(tokenizer.vocab_size, *self._texts) + 1, np.int64)
        self._lengths[list(self._texts)] = list(map(len, self._texts.values()))

    def encode(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: Tools | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Encode a conversation. Return token ids [n], int32, and the target mask [n], bool.

        A token is a target if any of its characters is, not counting whitespace that a special token absorbs from its
        neighbor. Special tokens spelled out in messages become these tokens, as in transformers; see `spells_special`.

        Raises:
            ConversationError: see `ChatTemplate.render`.
        """
        rendered = self.template.render(messages, train_on, tools)
        found, offsets = self._tokenizer.encode_special(rendered.text)
        ids = np.array(found, np.int32)
        spans = self._without_whitespace(rendered.text, ids, np.array(offsets, np.int64).reshape(-1, 2))
        return ids, _overlaps(spans, np.array(rendered.targets, np.int64).reshape(-1, 2))

    def prompt_ids(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Encode a conversation up to the beginning of the next assistant turn."""
        return self._tokenizer.encode_special(self.template.prompt(messages, tools))[0]

    def spells_special(self, messages: Sequence[Message]) -> bool:
        """Whether a message spells out a special token, which is then encoded as this token."""
        return any(self._special.search(text) for text in _strings(messages))

    def _without_whitespace(self, text: str, ids: npt.NDArray[np.int32], spans: Spans) -> Spans:
        """Shrink the spans [n, 2] of special tokens to the tokens themselves, without absorbed whitespace."""
        lengths, widths = self._lengths[ids], spans[:, 1] - spans[:, 0]
        for i in np.flatnonzero((lengths > 0) & (widths > lengths)):
            if (start := text.find(self._texts[int(ids[i])], *spans[i])) >= 0:
                spans[i] = start, start + lengths[i]
        return spans


def _overlaps(spans: Spans, targets: Spans) -> npt.NDArray[np.bool_]:
    """Whether each of `spans` [n, 2] shares a character with one of `targets`, which are in order."""
    starts, ends = spans.T
    i = np.searchsorted(targets[:, 1], starts, side="right")  # the first target that ends after the span's start
    shares = (starts < ends) & (i < len(targets))
    shares[shares] &= targets[i[shares], 0] < ends[shares]
    return np.asarray(shares)


def _strings(value: Any) -> list[str]:
    """Return every string in a message, at any depth."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in _strings(item)]

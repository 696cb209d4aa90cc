"""Conversations to token ids and their target mask."""

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
        tokenizer: of the model.
        template: for this tokenizer, as returned by `find_template`.

    Raises:
        TemplateError: the template ends the assistant's turns with no special token.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.template = template
        self.end_of_turn_id = tokenizer.special_tokens[template.end_of_turn]
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
        self._texts = {i: text for text, i in tokenizer.special_tokens.items()}
        self._lengths = np.zeros(max(tokenizer.vocab_size, *self._texts) + 1, np.int64)  # of special tokens, others 0
        self._lengths[list(self._texts)] = list(map(len, self._texts.values()))

    def encode(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: Tools | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids [n] of a conversation, and whether each is a target [n].

        A token is a target if one of its characters is, except white space that a special token takes from its
        neighbor. Special tokens spelled out in messages become these tokens, as in transformers; see `spells_special`.

        Raises:
            ConversationError: see `ChatTemplate.render`.
        """
        rendered = self.template.render(messages, train_on, tools)
        found, spans = self._tokenizer.encode_special(rendered.text)
        ids = np.array(found, np.int32)
        tokens = self._without_white_space(rendered.text, ids, np.array(spans, np.int64).reshape(-1, 2))
        return ids, _overlaps(tokens, np.array(rendered.targets, np.int64).reshape(-1, 2))

    def prompt_ids(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Ids of a conversation up to the beginning of the assistant's next turn."""
        return self._tokenizer.encode_special(self.template.prompt(messages, tools))[0]

    def spells_special(self, messages: Sequence[Message]) -> bool:
        """Whether a message spells out a special token, which is then encoded as this token."""
        return any(self._special.search(text) for text in _strings(messages))

    def _without_white_space(self, text: str, ids: npt.NDArray[np.int32], tokens: Spans) -> Spans:
        """The spans of tokens [n, 2]; those of special tokens without the white space of their neighbors."""
        lengths, widths = self._lengths[ids], tokens[:, 1] - tokens[:, 0]
        for i in np.flatnonzero((lengths > 0) & (widths > lengths)):
            if (start := text.find(self._texts[int(ids[i])], *tokens[i])) >= 0:
                tokens[i] = start, start + lengths[i]
        return tokens


def _overlaps(tokens: Spans, spans: Spans) -> npt.NDArray[np.bool_]:
    """Whether each token shares a character with one of `spans`, which are in order."""
    starts, ends = tokens.T
    i = np.searchsorted(spans[:, 1], starts, side="right")  # the first span that ends after the token's start
    shares = (starts < ends) & (i < len(spans))
    shares[shares] &= spans[i[shares], 0] < ends[shares]
    return np.asarray(shares)


def _strings(value: Any) -> list[str]:
    """Every string in a message."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in _strings(item)]

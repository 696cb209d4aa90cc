"""A chat template renders a conversation to text and finds the spans of it that are targets.

The text is that of the whole conversation, as the model sees it. `turns.py` finds the assistant turns in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from engine.data.chat.compiled import CompiledTemplate, Message
from engine.data.chat.errors import ConversationError, TemplateError
from engine.data.chat.turns import EndOfTurn, TurnFinder
from engine.data.tokenizers.protocol import Span

TrainOn = Literal["assistant", "all", "last"]
Tools = Sequence[Mapping[str, Any]]

PROBE = "The answer of the assistant."  # no template alters this text
_PROBE_CONVERSATION = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": PROBE}]

_PROBE_PARAMETERS = {"type": "object", "properties": {"a": {"type": "string", "description": "A."}}, "required": ["a"]}
_PROBE_FUNCTION = {"name": "probe", "description": "A function.", "parameters": _PROBE_PARAMETERS}
_PROBE_TOOLS = [{"type": "function", "function": _PROBE_FUNCTION}]


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and its target spans, which are sorted and do not touch."""

    text: str
    targets: tuple[Span, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """The format of conversations for a model.

    Args:
        name: the name or path of the template, for messages.
        source: the Jinja source.
        special_tokens_map: template variables for special tokens, such as `eos_token`, to their texts.
        special: the texts of all special tokens.

    Raises:
        TemplateError: it does not compile. Its methods raise as `CompiledTemplate.render` does.
    """

    name: str
    source: str
    special_tokens_map: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    _compiled: CompiledTemplate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", CompiledTemplate(self.source))

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """Render the prompt for the next assistant turn (`add_generation_prompt=True`).

        Raises:
            ConversationError: the template cannot render it.
        """
        return self._render(messages, tools, True)[0]

    def render(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: Tools | None = None
    ) -> Rendered:
        """Render a whole conversation and find its targets.

        Args:
            messages: the conversation.
            train_on: the targets: `assistant` for all assistant turns, `last` for the last one, without turns of
                `weight` 0 (OpenAI's format); `all` for the whole text.
            tools: JSON schemas, passed to the template as `tools`.

        Raises:
            ConversationError: the template cannot render it, or the assistant turns cannot be found in the text.
        """
        text, marked = self._render(messages, tools)
        if train_on == "all":
            return Rendered(text, ((0, len(text)),))
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        chosen = [k for k in (turns[-1:] if train_on == "last" else turns) if messages[k].get("weight") != 0]
        if self._compiled.marks_generation and chosen == turns:
            return Rendered(text, self._by_generation_blocks(text, marked))
        if not chosen:
            return Rendered(text, ())
        finder = TurnFinder(lambda some, prompt: self._render(some, tools, prompt)[0], messages, text, self._end)
        spans = finder.find(chosen)
        if not self._compiled.marks_generation:
            return Rendered(text, _merged(spans))
        marked = [(first, last) for first, last in marked if any(first < end and last > start for start, end in spans)]
        return Rendered(text, self._by_generation_blocks(text, marked))

    def _by_generation_blocks(self, text: str, marked: Sequence[Span]) -> tuple[Span, ...]:
        """Return the spans of `{% generation %}` blocks, each with its end of turn."""
        return _merged(self._end.extend(text, span) for span in marked)

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that ends assistant turns; generation stops at it.

        Raises:
            TemplateError: no special token follows the turn.
        """
        try:
            text = self._render(_PROBE_CONVERSATION)[0]
        except ConversationError as error:
            try:  # some are for conversations with tools
                text = self._render(_PROBE_CONVERSATION, _PROBE_TOOLS)[0]
            except ConversationError:
                raise TemplateError(
                    f"chat template {self.name}: fails for a question and its answer: {error}"
                ) from None
        _, found, rest = text.rpartition(PROBE)
        if not found:
            raise TemplateError(
                f"chat template {self.name}: does not write the content, a text, of the assistant message; "
                f"name another with --chat-template"
            )
        following = [token for token in self.special if rest.lstrip().startswith(token)]
        if not following:
            seen = f"{rest[:40]!r}" if rest.strip() else "nothing"
            raise TemplateError(
                f"chat template {self.name}: {seen} follows the assistant's answer, expected a special token of the "
                f"tokenizer, at which generation stops; let the template write {{{{ eos_token }}}} there"
            )
        return max(following, key=len)

    @cached_property
    def _end(self) -> EndOfTurn:
        return EndOfTurn(self.end_of_turn, self.special)

    def _render(
        self, messages: Sequence[Message], tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        variables = {**self.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        return self._compiled.render(messages, tools=tools, **variables)


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sort spans and merge those that overlap or touch."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)

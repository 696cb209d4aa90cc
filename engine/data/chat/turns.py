"""Where the assistant's turns stand in the text of a conversation.

A template with `{% generation %}` blocks marks them. For one without, `TurnFinder` renders the conversation turn by
turn: a turn is the text that follows the prompt for it. That text is then looked up in the text of the whole
conversation, because templates rewrite earlier turns (drop their thoughts, move the system message). A turn that cannot
be located with certainty is an error, never a guess. Alternative considered: searching for the role's marker strings,
which differ between templates and may occur in a message.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.data.chat.compiled import Message
from engine.data.chat.errors import ConversationError
from engine.data.tokenizers.protocol import Span

PLACEHOLDERS = ("\ufdd0", "\ufdd1")  # noncharacters, with which no content starts
MAX_RENDERED_MESSAGES = 50_000  # for all turns together; one or two seconds of work
CHARACTERS_PER_MESSAGE = 2000  # rendering so many takes as long as one more message

Render = Callable[[Sequence[Message], bool], str]  # messages, add_generation_prompt -> text


@dataclass(frozen=True)
class EndOfTurn:
    """The special token at which the assistant stops, among all special tokens of the tokenizer."""

    token: str
    special: tuple[str, ...]

    @cached_property
    def _special_pattern(self) -> str:
        return "|".join(map(re.escape, self.special))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(r"\s*" + re.escape(self.token))

    def extend(self, text: str, span: Span) -> Span:
        """A span of `text` with the end of turn that follows it, if it does not end with one."""
        start, end = span
        if not text[start:end].rstrip().endswith(self.token):
            found = self._pattern.match(text, end)
            end = found.end() if found else end
        return start, end

    def cut(self, turn: str) -> str | None:
        """`turn` without anything after its end of turn (white space, an end of text); None if it has no end."""
        content, found, rest = turn.rpartition(self.token)
        if found and not re.sub(self._special_pattern, "", rest).strip():
            return content + found
        turn = turn.rstrip()
        return turn if turn.endswith(self.special) else None


@dataclass(frozen=True)
class _Turn:
    """Message `k` as the template writes it at the end of a conversation: `head`, then `text`, its end included.

    `prompt` is the text that asks for it; it may contain more than `head`, such as a first `<think>`.
    """

    k: int
    prompt: str
    head: str
    text: str


class TurnFinder:
    r"""Finds the assistant's turns in the text of a whole conversation, for a template without generation blocks.

    Three strategies, tried in this order:

    - by prefix: the whole text begins with the turn and everything before it, as rendered at the end of a conversation.
    - after shortening: the text before the turn is the same, but the whole text has only the last part of the turn.
    - by placeholder: the text before the turn differs as well; rendering a placeholder instead of the turn's content
      shows where it stands.

    Example: Qwen3's template drops the thoughts of earlier turns. Of the messages

        user: Hi   assistant: <think>\nGreet.\n</think>\n\nHello!   user: 1+1?   assistant: <think>\nAdd.\n</think>\n\n2

    the whole text is (with `U` for `<|im_start|>user\n`, `A` for `<|im_start|>assistant\n`, `E` for `<|im_end|>`)

        U Hi E A Hello! E U 1+1? E A <think>\nAdd.\n</think>\n\n2 E

    Message 1, rendered at the end of a conversation, has the head `U Hi E A` and the text
    `<think>\nGreet.\n</think>\n\nHello! E`. The whole text does not begin with both. It does begin with the head, then
    has `Hello! E` up to the next `E`, and the turn's text ends with that: found after shortening. Message 3 keeps its
    thought and is found by prefix.

    Args:
        render: renders messages, with or without the prompt for the assistant's next turn.
        messages: the conversation.
        text: all messages, rendered.
        end: the end of turn.
    """

    def __init__(self, render: Render, messages: Sequence[Message], text: str, end: EndOfTurn) -> None:
        self._render, self._messages, self._text, self._end = render, messages, text, end

    def find(self, chosen: Sequence[int]) -> list[Span]:
        """Where the messages `chosen`, all of the assistant, stand in the text, ends of turn included.

        Rendering everything before each of them takes time that grows with the square of the conversation.

        Raises:
            ConversationError: there are too many, or one of them cannot be located with certainty.
        """
        self._check_work(len(chosen))
        spans = [self._find(k) for k in chosen]
        self._check_unique(chosen, spans)
        return spans

    def _find(self, k: int) -> Span:
        turn = self._at_the_end(k)
        for strategy in (self.by_prefix, self.after_shortening, self.by_placeholder):
            span = strategy(turn)
            if span and _squeezed(turn.text).endswith(_squeezed(self._text[slice(*span)])):
                return span
        raise ConversationError(f"message {k}: the template writes this turn of the assistant differently later on")

    def by_prefix(self, turn: _Turn) -> Span | None:
        """The text begins with the turn and what precedes it."""
        start, end = len(turn.head), len(turn.head) + len(turn.text)
        return (start, end) if self._text.startswith(turn.head + turn.text) else None

    def after_shortening(self, turn: _Turn) -> Span | None:
        """The text has the same before the turn, then less of it up to the next end of turn."""
        start, token = len(turn.head), self._end.token
        end = self._text.find(token, start) + len(token)
        unique = end > start and turn.text.count(token) == 1
        return (start, end) if unique and self._text.startswith(turn.head) else None

    def by_placeholder(self, turn: _Turn) -> Span | None:
        """The text differs before the turn too; it is found by rendering a placeholder instead of its content."""
        mark, full = PLACEHOLDERS[0], self._text
        alone = self._render(self._with_content(self._messages[: turn.k + 1], turn.k, mark), False)
        before, found, behind = self._render(self._with_content(self._messages, turn.k, mark), False).partition(mark)
        same = full.startswith(before) and full.endswith(behind) and len(full) >= len(before) + len(behind)
        if not (found and same and alone.startswith(turn.head) and alone.count(mark) == 1):
            return None
        lead, _, trail = alone[len(turn.head) :].partition(mark)
        trail = self._cut(trail, turn.k)
        if not behind.startswith(trail):
            return None
        start = len(before) - len(lead) if before.endswith(lead) else min(len(before), _shared([turn.prompt, full]))
        return start, len(full) - len(behind) + len(trail)

    def _at_the_end(self, k: int) -> _Turn:
        """Message `k` as the template writes it when it is the last message."""
        until = self._render(self._messages[: k + 1], False)
        try:
            prompt = self._render(self._messages[:k], True)
        except ConversationError:  # some templates accept no empty or unfinished conversation
            prompt = until
        start = self._start(k, prompt, until)
        return _Turn(k, prompt, until[:start], self._cut(until[start:], k))

    def _start(self, k: int, prompt: str, until: str) -> int:
        """Where in `until`, which ends with message `k`, the text begins that is not part of its prompt."""
        if until.startswith(prompt) and len(prompt) < len(until):
            return len(prompt)
        # The prompt has more than the text before the content, such as a first thought. The turn begins where both
        # differ, and where contents of other first characters do, too, so that no character of the content is lost.
        messages = self._messages[: k + 1]
        others = [self._render(self._with_content(messages, k, other), False) for other in PLACEHOLDERS]
        start = _shared([prompt, until, *others])
        earlier = "" if prompt == until else self._render(self._messages[:k], False)
        if others[0] == others[1] or start < len(earlier) or not until.startswith(earlier):
            raise ConversationError(f"message {k}: the template does not show where the assistant's turn begins")
        return start

    def _cut(self, turn: str, k: int) -> str:
        ended = self._end.cut(turn)
        if ended is None:
            raise ConversationError(f"message {k}: the template ends this turn of the assistant with no special token")
        return ended

    def _check_work(self, num_turns: int) -> None:
        messages, characters = len(self._messages), len(self._text)
        if num_turns * (messages + characters // CHARACTERS_PER_MESSAGE) > MAX_RENDERED_MESSAGES:
            raise ConversationError(
                f"{num_turns:,} turns of the assistant among {messages:,} messages ({characters:,} characters) "
                f"are too many to find without {{% generation %}} marks in the template; "
                f"use a template with marks, or split the conversation"
            )

    def _check_unique(self, chosen: Sequence[int], spans: Sequence[Span]) -> None:
        """A turn that a later message repeats could be that message, if the template leaves out the turn itself."""
        contents = [m.get("content") for m in self._messages]
        said = [_squeezed(content) if isinstance(content, str) else "" for content in contents]
        texts = [_squeezed(self._text[start:end].removesuffix(self._end.token)) for start, end in spans]
        doubtful = [
            k for k, text in zip(chosen, texts, strict=True)
            if any(later and text.endswith(later) for later in said[k + 1 :])
        ]  # fmt: skip
        if doubtful:
            self._check_written(doubtful)

    def _check_written(self, turns: Sequence[int]) -> None:
        """Whether the template writes the contents of all `turns`."""
        start, end = PLACEHOLDERS
        exchanged = [*self._messages]
        for k in turns:
            exchanged[k] = {**exchanged[k], "content": f"{start}{k}{end}"}
        written = re.findall(f"{start}(\\d+){end}", self._render(exchanged, False))
        if lost := [k for k in turns if written.count(str(k)) != 1]:
            raise ConversationError(f"message {lost[0]}: the template leaves this turn of the assistant out later on")

    @staticmethod
    def _with_content(messages: Sequence[Message], k: int, content: str) -> list[Message]:
        return [{**message, "content": content} if i == k else message for i, message in enumerate(messages)]


def _squeezed(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())


def _shared(texts: Sequence[str]) -> int:
    """The length of the common prefix of all texts."""
    first, last = min(texts), max(texts)  # in alphabetical order, so all texts between share what these two share
    return bisect.bisect_left(range(min(len(first), len(last))), True, key=lambda i: first[: i + 1] != last[: i + 1])

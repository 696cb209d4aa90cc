"""Finds the spans of assistant turns in the text of a conversation.

A template with `{% generation %}` blocks marks them. For a template without, `TurnFinder` renders the conversation turn
by turn: a turn is the text that follows its prompt. That text is then located in the text of the whole conversation,
because templates rewrite earlier turns (drop their thoughts, move the system message). A turn that cannot be located
with certainty is an error. Alternative considered: searching for the role's marker strings, which differ between
templates and may occur in a message.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.data.chat.compiled import Message
from engine.data.chat.errors import ConversationError
from engine.data.tokenizers.protocol import Span

PLACEHOLDERS = ("\ufdd0", "\ufdd1")  # noncharacters, so no content starts with them
OTHERWISE = "use a template that marks turns with {% generation %} blocks, or one of --chat-template"
MAX_RENDERED_MESSAGES = 50_000  # for all turns of a conversation; one or two seconds of work
CHARACTERS_PER_MESSAGE = 2000  # rendering this many takes as long as one message

Render = Callable[[Sequence[Message], bool], str]  # messages, add_generation_prompt -> text


@dataclass(frozen=True)
class EndOfTurn:
    """The special token that ends an assistant turn, and all special tokens of the tokenizer."""

    token: str
    special: tuple[str, ...]

    @cached_property
    def _special_pattern(self) -> str:
        return "|".join(map(re.escape, self.special))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(r"\s*" + re.escape(self.token))

    def at(self, text: str, offset: int) -> str | None:
        """Return the special token at `offset` of `text`."""
        return max((token for token in self.special if text.startswith(token, offset)), key=len, default=None)

    def first(self, text: str) -> set[str]:
        """Return the special tokens before any other text."""
        found: set[str] = set()
        while token := self.at(text := text.lstrip(), 0):
            found.add(token)
            text = text.removeprefix(token)
        return found

    def extend(self, text: str, span: Span) -> Span:
        """Extend a span of `text` by the end of turn that follows it, unless it ends with one already."""
        start, end = span
        if not text[start:end].rstrip().endswith(self.token):
            found = self._pattern.match(text, end)
            end = found.end() if found else end
        return start, end

    def cut(self, turn: str) -> str | None:
        """Remove what follows the end of turn (whitespace, an end of text); None if `turn` has no end of turn."""
        content, found, rest = turn.rpartition(self.token)
        if found and not re.sub(self._special_pattern, "", rest).strip():
            return content + found
        turn = turn.rstrip()
        return turn if turn.endswith(self.special) else None


@dataclass(frozen=True)
class _Turn:
    """Message `k` rendered at the end of a conversation: `head`, then `text`, which includes the end of turn.

    `prompt` is the generation prompt for it; it may be longer than `head`, for example by a first `<think>`.
    """

    k: int
    prompt: str
    head: str
    text: str


class TurnFinder:
    r"""Finds assistant turns in the text of a whole conversation, for a template without generation blocks.

    Four strategies, tried in this order:

    - by prefix: the whole text begins with the turn and everything before it, as rendered at the end of a conversation.
    - by other end: as before, but another special token ends the turn.
    - after shortening: the text before the turn is the same, but the whole text has only the last part of the turn.
    - by placeholder: the text before the turn differs, too; rendering a placeholder instead of the turn's content
      shows its position.

    Example: Qwen3's template drops the thoughts of earlier turns. Of the messages

        user: Hi   assistant: <think>\nGreet.\n</think>\n\nHello!   user: 1+1?   assistant: <think>\nAdd.\n</think>\n\n2

    the whole text is (with `U` for `<|im_start|>user\n`, `A` for `<|im_start|>assistant\n`, `E` for `<|im_end|>`)

        U Hi E A Hello! E U 1+1? E A <think>\nAdd.\n</think>\n\n2 E

    Message 1, rendered at the end of a conversation, has the head `U Hi E A` and the text
    `<think>\nGreet.\n</think>\n\nHello! E`. The whole text does not begin with both. It does begin with the head, then
    has `Hello! E` up to the next `E`, and the turn's text ends with that: found after shortening. Message 3 keeps its
    thought and is found by prefix.

    Args:
        render: renders messages, with or without the generation prompt for the next assistant turn.
        messages: the conversation.
        text: all messages, rendered.
        end: the end of turn.
    """

    def __init__(self, render: Render, messages: Sequence[Message], text: str, end: EndOfTurn) -> None:
        self._render, self._messages, self._text, self._end = render, messages, text, end

    def find(self, chosen: Sequence[int]) -> list[Span]:
        """Return the spans of the assistant messages `chosen` in the text, including their ends of turn.

        Renders everything before each of them, so the time is quadratic in the length of the conversation.

        Raises:
            ConversationError: there are too many turns, or one of them cannot be located with certainty.
        """
        self._check_work(len(chosen))
        spans = [self._find(k) for k in chosen]
        self._check_unique(chosen, spans)
        return spans

    def _find(self, k: int) -> Span:
        turn = self._at_the_end(k)
        if span := self.by_prefix(turn) or self.by_other_end(turn):
            return span
        for strategy in (self.after_shortening, self.by_placeholder):
            span = strategy(turn)
            if span and _squeezed(turn.text).endswith(_squeezed(self._text[slice(*span)])):
                return span
        raise ConversationError(
            f"message {k}: the template renders this assistant turn differently in a longer conversation; {OTHERWISE}"
        )

    def by_prefix(self, turn: _Turn) -> Span | None:
        """Match the turn and everything before it at the beginning of the text."""
        start, end = len(turn.head), len(turn.head) + len(turn.text)
        return (start, end) if self._text.startswith(turn.head + turn.text) else None

    def by_other_end(self, turn: _Turn) -> Span | None:
        """Match the turn with another special token at its end, as gpt-oss has it in the middle of a conversation; not
        with one that begins the conversation, as it would begin the next turn.
        """
        body = turn.head + turn.text.removesuffix(self._end.token)
        found = self._end.at(self._text, len(body)) if self._text.startswith(body) else None
        if found is None or found in self._end.first(self._text):
            return None
        return len(turn.head), len(body) + len(found)

    def after_shortening(self, turn: _Turn) -> Span | None:
        """Match everything before the turn; the text then has a shorter turn, up to the next end of turn."""
        start, token = len(turn.head), self._end.token
        end = self._text.find(token, start) + len(token)
        unique = end > start and turn.text.count(token) == 1
        return (start, end) if unique and self._text.startswith(turn.head) else None

    def by_placeholder(self, turn: _Turn) -> Span | None:
        """Locate the turn by rendering a placeholder instead of its content, if the text before it differs."""
        mark, full = PLACEHOLDERS[0], self._text
        until = self._render(self._with_content(self._messages[: turn.k + 1], turn.k, mark), False)
        before, found, after = self._render(self._with_content(self._messages, turn.k, mark), False).partition(mark)
        same = full.startswith(before) and full.endswith(after) and len(full) >= len(before) + len(after)
        if not (found and same and until.startswith(turn.head) and until.count(mark) == 1):
            return None
        lead, _, trail = until[len(turn.head) :].partition(mark)
        trail = self._cut(trail, turn.k)
        if not after.startswith(trail):
            return None
        start = len(before) - len(lead) if before.endswith(lead) else min(len(before), _shared([turn.prompt, full]))
        return start, len(full) - len(after) + len(trail)

    def _at_the_end(self, k: int) -> _Turn:
        """Render message `k` as the last message."""
        until = self._render(self._messages[: k + 1], False)
        try:
            prompt = self._render(self._messages[:k], True)
        except ConversationError:  # some templates reject an empty or unfinished conversation
            prompt = until
        start = self._start(k, prompt, until)
        return _Turn(k, prompt, until[:start], self._cut(until[start:], k))

    def _start(self, k: int, prompt: str, until: str) -> int:
        """Return the offset in `until`, which ends with message `k`, at which the text after its prompt begins."""
        if until.startswith(prompt) and len(prompt) < len(until):
            return len(prompt)
        # The prompt is longer than the text before the content, for example by the start of a thought. The turn begins
        # where prompt and text differ, or earlier, where contents with other first characters differ from it, so that
        # no character of the content is lost.
        messages = self._messages[: k + 1]
        others = [self._render(self._with_content(messages, k, other), False) for other in PLACEHOLDERS]
        if others[0] == others[1]:  # some templates write the calls of a message only
            others = [self._render(self._with_call(messages, k, other), False) for other in PLACEHOLDERS]
        start = _shared([prompt, until, *others])
        earlier = "" if prompt == until else self._render(self._messages[:k], False)
        if others[0] == others[1]:
            start = -1
        elif start < len(earlier) or not until.startswith(earlier):
            start = self._after_last_message(k, prompt, until[: _shared([until, *others])])
        if start < 0:
            raise ConversationError(
                f"message {k}: the template does not show where this assistant turn begins; {OTHERWISE}"
            )
        return start

    def _after_last_message(self, k: int, prompt: str, before: str) -> int:
        """Return the offset after the message before turn `k` in `before`, the text up to the content of the turn.

        For templates that write earlier messages differently once the turn is there: Mistral's has the system prompt
        in the last message, if this is the user's. Searches for the prompt from the content of its last message on,
        then for the same with other whitespace behind the content. Returns -1 if it is not there.
        """
        said = self._messages[k - 1].get("content") if k else None
        at = prompt.rfind(said) if isinstance(said, str) and said.strip() else -1
        if at < 0:
            return -1
        tail = prompt[at:]
        if (found := before.rfind(tail)) >= 0:
            return found + len(tail)
        assert isinstance(said, str)
        rest = tail[len(said) :]
        pattern = re.escape(said) + "".join(r"\s*" + re.escape(character) for character in _squeezed(rest))
        ends = [match.end() for match in re.finditer(pattern, before)]
        space = rest[len(rest.rstrip()) :]
        return ends[-1] + len(space) * before.startswith(space, ends[-1]) if ends else -1

    def _cut(self, turn: str, k: int) -> str:
        ended = self._end.cut(turn)
        if ended is None:
            raise ConversationError(
                f"message {k}: the template does not end this assistant turn with a special token; {OTHERWISE}"
            )
        return ended

    def _check_work(self, num_turns: int) -> None:
        messages, characters = len(self._messages), len(self._text)
        if num_turns * (messages + characters // CHARACTERS_PER_MESSAGE) > MAX_RENDERED_MESSAGES:
            raise ConversationError(
                f"{num_turns:,} assistant turns among {messages:,} messages ({characters:,} characters) "
                f"are too many to find without {{% generation %}} blocks in the template; "
                f"use a template with such blocks, or split the conversation"
            )

    def _check_unique(self, chosen: Sequence[int], spans: Sequence[Span]) -> None:
        """Check turns that a later message repeats: if the template drops the turn, the match is that message."""
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
        """Check that the template writes the contents of all `turns`.

        Raises:
            ConversationError: it drops one of them.
        """
        start, end = PLACEHOLDERS
        exchanged = [*self._messages]
        for k in turns:
            exchanged[k] = {**exchanged[k], "content": f"{start}{k}{end}"}
        written = re.findall(f"{start}(\\d+){end}", self._render(exchanged, False))
        if lost := [k for k in turns if written.count(str(k)) != 1]:
            raise ConversationError(
                f"message {lost[0]}: the template drops this assistant turn in a longer conversation"
            )

    @staticmethod
    def _with_call(messages: Sequence[Message], k: int, name: str) -> list[Message]:
        """Replace the names of the functions that message `k` calls."""
        calls = messages[k].get("tool_calls")
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            return list(messages)
        named = [
            {**call, "function": {**call["function"], "name": name}}
            if isinstance(call.get("function"), dict)
            else {**call, "name": name}
            for call in calls
        ]
        return [{**message, "tool_calls": named} if i == k else message for i, message in enumerate(messages)]

    @staticmethod
    def _with_content(messages: Sequence[Message], k: int, content: str) -> list[Message]:
        return [{**message, "content": content} if i == k else message for i, message in enumerate(messages)]


def _squeezed(text: str) -> str:
    """Remove all whitespace."""
    return "".join(text.split())


def _shared(texts: Sequence[str]) -> int:
    """Return the length of the common prefix of all texts."""
    first, last = min(texts), max(texts)  # in alphabetical order; all texts between share their prefix
    return bisect.bisect_left(range(min(len(first), len(last))), True, key=lambda i: first[: i + 1] != last[: i + 1])

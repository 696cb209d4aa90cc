"""Chat templates are programs that come with a model: here they are compiled and run, in a sandbox and on a budget.

The sandbox gives a template nothing to escape with, the budget ends it when it loops for ever or grows without bound.
The budget grows with the conversation, so that only what grows faster than its input runs out of it. Rejected: a limit
on time (signals reach only main threads, and neither they nor other threads interrupt a single long operation), a
process per template (pipes cost more than the rendering).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from engine.data.chat.budget import Budget, TemplateError
from engine.data.chat.sandbox import BUDGET, Environment, Metering, generation_in_buffer, is_generation

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end) in characters

SOURCE_LIMIT = 1 << 16  # characters; the longest templates in use have two fifths of it
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # never text; two of them enclose what the assistant writes


class ConversationError(ValueError):
    """This conversation cannot be rendered by the template; the text says why, for a person."""


class CompiledTemplate:
    """A template, ready to render any number of conversations, in any thread.

    Raises:
        TemplateError: it is not a template, or uses what a chat template has no business with.
    """

    def __init__(self, source: str) -> None:
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"the chat template has {len(source):,} characters, more than {SOURCE_LIMIT:,}")
        environment = Environment()
        try:
            source.encode()  # no half of a surrogate pair
            tree = environment.parse(source)
            self.marks_generation = any(map(is_generation, tree.find_all(nodes.CallBlock)))
            self._in_buffer = generation_in_buffer(tree)
            Metering().visit(tree)
            tree.set_environment(environment)
            self._template = environment.from_string(tree)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not parse: {_short(error)} (line {_line(error)})") from None
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TemplateError(
                f"the chat template does not compile: {type(error).__name__}: {_short(error)}"
            ) from None
        self._used = frozenset(NONCHARACTERS).intersection(source)

    def render(self, messages: Sequence[Message], *, tools: Any = None, **variables: Any) -> tuple[str, list[Span]]:
        """The text, and what `{% generation %}` blocks wrote of it.

        Args:
            messages: the conversation.
            tools: belong to it, so that the budget grows with them too.
            variables: what else the template sees, such as the texts of special tokens.

        Raises:
            ConversationError: the template cannot render these messages.
            TemplateError: it tries to escape, or spends more than its budget.
        """
        inputs = _PlainData()
        try:
            conversation = {"messages": inputs.messages(messages), "tools": inputs.of(tools)}
            characters = inputs.characters
            variables = {**conversation, **inputs.of(variables)}
        except RecursionError:
            raise ConversationError("a message is nested too deep") from None
        unused = [mark for mark in NONCHARACTERS if mark not in self._used | inputs.noncharacters]
        if len(unused) < 2:
            raise ConversationError("the messages hold nearly all Unicode noncharacters, of which two are needed")
        marks = (unused[0], unused[1]) if self.marks_generation else ("", "")
        marked = self._run(variables, Budget(characters, marks))
        text, spans = _without_marks(marked, marks) if self.marks_generation else (marked, [])
        if self._in_buffer and text != self._run(variables, Budget(characters, ("", ""))):
            raise TemplateError(
                "the chat template computes with the text of a {% generation %} block; learn another way"
            )
        _check_unicode(text)
        return text, spans

    def _run(self, variables: Mapping[str, Any], budget: Budget) -> str:
        context = self._template.new_context({**variables, BUDGET: budget})
        try:
            return "".join(self._template.root_render_func(context))
        except TemplateError:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the chat template tries what it must not: {_short(error)}") from None
        except (RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template recurses or grows without bound: {type(error).__name__}") from None
        except jinja2.UndefinedError as error:
            raise ConversationError(f"the template misses something in the conversation: {_short(error)}") from None
        except jinja2.TemplateError as error:  # of raise_exception
            raise ConversationError(_short(error)) from None
        except Exception as error:  # whatever an expression can raise
            raise ConversationError(f"the template fails with {type(error).__name__}: {_short(error)}") from None


class _PlainData:
    """Copies of what a template gets to see, of JSON's types only, and their size."""

    def __init__(self) -> None:
        self.characters = 0
        self.noncharacters: set[str] = set()

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """A key whose value is None counts as absent, as in transformers."""
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ConversationError(
                "a conversation is a list of messages, one at least, each with `role` and `content`"
            )
        return [self.of({key: value for key, value in message.items() if value is not None}) for message in messages]

    def of(self, value: Any) -> Any:
        self.characters += 1
        if isinstance(value, str):
            self.characters += len(value)
            if not value.isascii():
                self.noncharacters.update(mark for mark in NONCHARACTERS if mark in value)
            return str(value)
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, dict):
            return {self.of(key): self.of(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        raise ConversationError(f"a {type(value).__name__} in a message, expected what JSON has")


def _without_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """The text between marks, and where it stands once they are gone; marks inside others add nothing."""
    start, end = marks
    parts: list[str] = []
    spans: list[Span] = []
    depth = at = opened = 0
    for part in re.split(f"([{start}{end}])", text):
        if part == start:
            opened = opened if depth else at
            depth += 1
        elif part == end:
            depth -= 1
            if not depth and at > opened:
                spans.append((opened, at))
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), spans


def _check_unicode(text: str) -> None:
    """Whether a text can be stored and given to a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"the text has half of a surrogate pair, U+{ord(text[error.start]):04X}, which is no character"
        ) from None


def _short(error: Exception) -> str:
    """What an error says, without characters that do something to a terminal."""
    text = str(error) or type(error).__name__
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:300])
    return shown if len(text) <= 300 else shown + " ..."


def _line(error: jinja2.TemplateError) -> int | str:
    return getattr(error, "lineno", "?")

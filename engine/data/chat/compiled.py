"""Compiles and runs chat templates, which are untrusted programs that come with a model.

The sandbox restricts what a template can call; the budget stops infinite loops and unbounded growth. The budget is
proportional to the conversation, so a template exceeds it only if its work grows faster than its input. Alternatives
considered: a time limit (signals reach only main threads, and neither signals nor other threads interrupt a single long
operation); a process per template (pipes cost more than rendering).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from engine.data.chat.budget import Budget
from engine.data.chat.errors import ConversationError, TemplateError
from engine.data.chat.metering import Metering
from engine.data.chat.sandbox import BUDGET, Environment, generation_in_buffer, is_generation
from engine.data.tokenizers.protocol import Span

Message = dict[str, Any]

SOURCE_LIMIT = 1 << 16  # characters; the longest published templates use two fifths of it
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names that data and templates have for thoughts
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # never part of text; two of them mark generation blocks


class CompiledTemplate:
    """A compiled template; renders any number of conversations, in any thread.

    Raises:
        TemplateError: the source does not compile, or uses features that chat templates must not use.
    """

    def __init__(self, source: str) -> None:
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"the chat template has {len(source):,} characters, more than {SOURCE_LIMIT:,}")
        environment = Environment()
        try:
            source.encode()  # raises for an unpaired surrogate
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
        """Render a conversation. Return the text and the spans of it that `{% generation %}` blocks wrote.

        Args:
            messages: the conversation.
            tools: the template's variable `tools`; counts as part of the conversation for the budget.
            variables: other template variables, such as the texts of special tokens.

        Raises:
            ConversationError: the template cannot render these messages.
            TemplateError: the template uses a forbidden operation or exceeds its budget.
        """
        inputs = _PlainData()
        try:
            conversation = {"messages": inputs.messages(messages), "tools": inputs.of(tools)}
            characters = inputs.characters
            variables = {**conversation, **inputs.of(variables)}
        except RecursionError:
            raise ConversationError("a message is nested too deeply") from None
        unused = [mark for mark in NONCHARACTERS if mark not in self._used | inputs.noncharacters]
        if len(unused) < 2:
            raise ConversationError(
                "the messages contain nearly all Unicode noncharacters; rendering needs two unused ones"
            )
        marks = (unused[0], unused[1]) if self.marks_generation else ("", "")
        marked = self._run(variables, Budget(characters, marks))
        text, spans = _without_marks(marked, marks) if self.marks_generation else (marked, [])
        if self._in_buffer and text != self._run(variables, Budget(characters, ("", ""))):
            raise TemplateError(
                "the chat template computes with the text of a {% generation %} block; "
                "remove the {% generation %} tags or use another template"
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
            raise TemplateError(f"the chat template uses a forbidden operation: {_short(error)}") from None
        except (RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template recurses or grows without bound: {type(error).__name__}") from None
        except jinja2.UndefinedError as error:
            raise ConversationError(f"the template reads an undefined variable: {_short(error)}") from None
        except jinja2.TemplateError as error:  # raised by the template's raise_exception
            raise ConversationError(_short(error)) from None
        except Exception as error:  # an expression can raise anything
            raise ConversationError(f"the template fails with {type(error).__name__}: {_short(error)}") from None


class _PlainData:
    """Copies the variables of a template, allows only JSON types, and counts their characters."""

    def __init__(self) -> None:
        self.characters = 0
        self.noncharacters: set[str] = set()

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Copy messages without keys whose value is None, and with thoughts under all names, as transformers 5 does."""
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ConversationError("a conversation is a list of at least one message, each with `role` and `content`")
        return [self.of(_with_thoughts({k: v for k, v in message.items() if v is not None})) for message in messages]

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
        raise ConversationError(f"a {type(value).__name__} in a message, expected a JSON type")


def _with_thoughts(message: Message) -> Message:
    """Add a message's thoughts under all of `THOUGHTS`, if it has them under one: a template reads any of these."""
    own = {key: message[key] for key in THOUGHTS if isinstance(message.get(key), str) and message[key]}
    return {**message, **dict.fromkeys(THOUGHTS, next(iter(own.values()))), **own} if own else message


def _without_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """Remove the marks. Return the text and the spans they enclosed; nested marks are ignored."""
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
    """Check that a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"the text has an unpaired surrogate U+{ord(text[error.start]):04X}, which cannot be encoded as UTF-8"
        ) from None


def _short(error: Exception) -> str:
    """Return an error's message, with control characters escaped, cut to 300 characters."""
    text = str(error) or type(error).__name__
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:300])
    return shown if len(text) <= 300 else shown + " ..."


def _line(error: jinja2.TemplateError) -> int | str:
    return error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else "?"

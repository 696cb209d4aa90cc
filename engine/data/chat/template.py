"""Conversations to token ids, and which of the tokens are learned.

A chat template writes a conversation as one text; the ids are those of the whole text, as a model meets it. What the
assistant writes is known from the template's `{% generation %}` blocks, else from rendering turn by turn: a turn is
what appears behind the prompt that asks for it. That is then looked up in the text of the whole conversation, because
templates rewrite earlier turns (drop their thoughts, move the system's message); what cannot be found there without
doubt is an error, never a guess. Rejected: searching for the role's marker strings, which are another for each
template and may stand in a message.
"""

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.compiled import SOURCE_LIMIT, CompiledTemplate, ConversationError, Message, Span, TemplateError
from engine.data.tokenizers.files import CHAT_TEMPLATE
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError

__all__ = [
    "ChatEncoder",
    "ChatTemplate",
    "ConversationError",
    "Message",
    "Rendered",
    "TemplateError",
    "TrainOn",
    "find_template",
]

TrainOn = Literal["assistant", "all", "last"]
Tools = Sequence[Mapping[str, Any]]
Spans = npt.NDArray[np.int64]  # [n, 2], start and end in characters

PROBE = "The answer of the assistant."  # survives whatever a template does to contents
_PROBE_CONVERSATION = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": PROBE}]
_OTHER_STARTS = ("\ufdd0", "\ufdd1")  # two that no content starts with
_MOST_RENDERED = 50_000  # messages, for all turns together; a second or two of work
_CHARACTERS_A_MESSAGE = 2000  # that take as long as a message does whatever it holds
_LONGEST_ROLE = 1000  # characters of `bos_token` and the like
_MOST_ROLES = 100


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text, and the parts of it that are learned, [start, end) in characters, in order."""

    text: str
    learned: tuple[Span, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written for a model.

    Args:
        name: where it comes from.
        source: in Jinja.
        roles: the variables of the template that hold tokens, such as `eos_token`.
        special: the texts of all special tokens.

    Raises:
        TemplateError: it does not compile. Later: see `CompiledTemplate.render`.
    """

    name: str
    source: str
    roles: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    _compiled: CompiledTemplate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", CompiledTemplate(self.source))

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """The text that the assistant's next turn continues.

        Raises:
            ConversationError: the template cannot render it.
        """
        return self._render(messages, tools, True)[0]

    def render(
        self, messages: Sequence[Message], train_on: TrainOn = "assistant", tools: Tools | None = None
    ) -> Rendered:
        """The text of a whole conversation.

        Args:
            messages: the conversation.
            train_on: what is learned: all turns of the assistant, everything, or the assistant's last turn; but for
                turns of `weight` 0 (OpenAI's way to leave some out).
            tools: what the template calls so, as JSON schemas.

        Raises:
            ConversationError: the template cannot render it, or not in such a way that the assistant's turns are known.
        """
        text, marked = self._render(messages, tools, False)
        if train_on == "all":
            return Rendered(text, ((0, len(text)),))
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        chosen = [k for k in (turns[-1:] if train_on == "last" else turns) if messages[k].get("weight") != 0]
        if not self._compiled.marks_generation:
            return Rendered(text, _merged(self._turns(messages, chosen, tools, text)))
        if chosen != turns:
            spans = self._turns(messages, chosen, tools, text)
            marked = [span for span in marked if any(span[0] < end and span[1] > start for start, end in spans)]
        return Rendered(text, _merged(self._with_end_of_turn(text, span) for span in marked))

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that follows what the assistant says.

        Raises:
            TemplateError: there is none.
        """
        try:
            text = self._render(_PROBE_CONVERSATION)[0]
        except ConversationError as error:
            raise TemplateError(f"chat template {self.name}: fails for a question and its answer: {error}") from None
        _, found, behind = text.rpartition(PROBE)
        if not found:
            raise TemplateError(f"chat template {self.name}: does not write the content of the assistant's message")
        token = self._special_at(behind.lstrip())
        if token is None:
            seen = f"{behind[:40]!r}" if behind.strip() else "nothing"
            raise TemplateError(
                f"chat template {self.name}: {seen} follows the assistant's answer, expected a special token of the "
                f"tokenizer, at which generation stops; let the template write {{{{ eos_token }}}} there"
            )
        return token

    def _render(
        self, messages: Sequence[Message], tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        variables = {**self.roles, "add_generation_prompt": add_generation_prompt}
        return self._compiled.render(messages, tools=tools, **variables)

    @cached_property
    def _specials(self) -> str:
        return "|".join(map(re.escape, self.special))

    @cached_property
    def _ending(self) -> re.Pattern[str]:
        return re.compile(r"\s*" + re.escape(self.end_of_turn))

    def _special_at(self, text: str) -> str | None:
        """The longest special token that `text` starts with."""
        return max((token for token in self.special if text.startswith(token)), key=len, default=None)

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        """A marked span and the end of turn that follows it, where the marks leave that out."""
        start, end = span
        if not text[start:end].rstrip().endswith(self.end_of_turn):
            found = self._ending.match(text, end)
            end = found.end() if found else end
        return start, end

    def _turns(self, messages: Sequence[Message], chosen: Sequence[int], tools: Tools | None, full: str) -> list[Span]:
        """Where the messages `chosen`, of the assistant, stand in the text `full` of all messages.

        Each is found by rendering what precedes it, so that the work grows with the square of the conversation.
        """
        if len(chosen) * (len(messages) + len(full) // _CHARACTERS_A_MESSAGE) > _MOST_RENDERED:
            raise ConversationError(
                f"{len(chosen):,} turns of the assistant among {len(messages):,} messages ({len(full):,} characters) "
                f"are too many to find without {{% generation %}} marks in the template; "
                f"use a template with marks, or split the conversation"
            )
        spans = [self._turn(messages, k, tools, full) for k in chosen]
        said = [_squeezed(content) if isinstance(content := m.get("content"), str) else "" for m in messages]
        texts = [_squeezed(full[start:end].removesuffix(self.end_of_turn)) for start, end in spans]
        doubtful = [
            k for k, text in zip(chosen, texts, strict=True)
            if any(later and text.endswith(later) for later in said[k + 1 :])
        ]  # fmt: skip
        if doubtful:
            self._check_written(messages, doubtful, tools)
        return spans

    def _check_written(self, messages: Sequence[Message], turns: Sequence[int], tools: Tools | None) -> None:
        """Whether the text has the contents of all `turns`, or leaves some out and a later message says the same."""
        start, end = _OTHER_STARTS
        exchanged = [*messages]
        for k in turns:
            exchanged[k] = {**messages[k], "content": f"{start}{k}{end}"}
        written = re.findall(f"{start}(\\d+){end}", self._render(exchanged, tools)[0])
        if lost := [k for k in turns if written.count(str(k)) != 1]:
            raise ConversationError(f"message {lost[0]}: the template leaves this turn of the assistant out later on")

    def _turn(self, messages: Sequence[Message], k: int, tools: Tools | None, full: str) -> Span:
        """Where message `k`, of the assistant, stands in the text `full` of all messages, its end of turn included."""
        until = self._render(messages[: k + 1], tools)[0]
        prompt = self._prompt_or(until, messages[:k], tools)
        start = self._start(messages, k, tools, prompt, until)
        head, turn = until[:start], self._up_to_its_end(until[start:], k)
        if full.startswith(head + turn):
            return start, start + len(turn)
        # Later on the template writes it otherwise: without thoughts, without white space at its ends, elsewhere.
        found = self._behind(head, turn, full)
        if found and _squeezed(turn).endswith(_squeezed(full[slice(*found)])):
            return found
        found = self._exchanged(messages, k, tools, full, prompt, head)
        if found and _squeezed(turn).endswith(_squeezed(full[slice(*found)])):
            return found
        raise ConversationError(f"message {k}: the template writes this turn of the assistant otherwise later on")

    def _prompt_or(self, other: str, messages: Sequence[Message], tools: Tools | None) -> str:
        """The prompt that `messages` give, or `other`: some templates accept no empty or unfinished conversation."""
        try:
            return self.prompt(messages, tools)
        except ConversationError:
            return other

    def _start(self, messages: Sequence[Message], k: int, tools: Tools | None, prompt: str, until: str) -> int:
        """Where in `until`, which ends with message `k`, the text begins that its prompt does not give."""
        if until.startswith(prompt) and len(prompt) < len(until):
            return len(prompt)
        # The prompt holds more than precedes the content, such as a first thought. Characters of it that the content
        # happens to begin with are no part of the beginning that both share.
        others = [self._render(_with_content(messages[: k + 1], k, other), tools)[0] for other in _OTHER_STARTS]
        start = _shared([prompt, until, *others])
        earlier = "" if prompt == until else self._render(messages[:k], tools)[0]
        if others[0] == others[1] or start < len(earlier) or not until.startswith(earlier):
            raise ConversationError(f"message {k}: the template does not let see where the assistant's turn begins")
        return start

    def _up_to_its_end(self, turn: str, k: int) -> str:
        """Without what follows the end of turn: white space, an end of text."""
        said, found, behind = turn.rpartition(self.end_of_turn)
        if found and not re.sub(self._specials, "", behind).strip():
            return said + found
        turn = turn.rstrip()
        if not turn.endswith(self.special):
            raise ConversationError(f"message {k}: the template ends this turn of the assistant with no special token")
        return turn

    def _behind(self, head: str, turn: str, full: str) -> Span | None:
        """The turn in a text that has the same before it, but the turn itself shortened."""
        end = full.find(self.end_of_turn, len(head)) + len(self.end_of_turn)
        unique = end > len(head) and turn.count(self.end_of_turn) == 1
        return (len(head), end) if unique and full.startswith(head) else None

    def _exchanged(
        self, messages: Sequence[Message], k: int, tools: Tools | None, full: str, prompt: str, head: str
    ) -> Span | None:
        """The turn in a text that differs before it too, found by exchanging its content for a mark."""
        mark = _OTHER_STARTS[0]
        alone = self._render(_with_content(messages[: k + 1], k, mark), tools)[0]
        before, found, behind = self._render(_with_content(messages, k, mark), tools)[0].partition(mark)
        same = full.startswith(before) and full.endswith(behind) and len(full) >= len(before) + len(behind)
        if not (found and same and alone.startswith(head) and alone.count(mark) == 1):
            return None
        lead, _, trail = alone[len(head) :].partition(mark)
        trail = self._up_to_its_end(trail, k)
        start = len(before) - len(lead) if before.endswith(lead) else min(len(before), _shared([prompt, full]))
        return (start, len(full) - len(behind) + len(trail)) if behind.startswith(trail) else None


class ChatEncoder:
    """Conversations as ids of a tokenizer.

    Args:
        tokenizer: of the model.
        template: as `find_template` gives it for this tokenizer.

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
        """Ids [n] of a conversation, and which of them are learned [n].

        A token is learned when one of its characters is, but for white space that a special token takes from its
        neighbour. Special tokens that messages spell out become these tokens, as in transformers; see `spells_special`.

        Raises:
            ConversationError: see `ChatTemplate.render`.
        """
        rendered = self.template.render(messages, train_on, tools)
        found, spans = self._tokenizer.encode_special(rendered.text)
        ids = np.array(found, np.int32)
        tokens = self._without_white_space(rendered.text, ids, np.array(spans, np.int64).reshape(-1, 2))
        return ids, _shares(tokens, np.array(rendered.learned, np.int64).reshape(-1, 2))

    def _without_white_space(self, text: str, ids: npt.NDArray[np.int32], tokens: Spans) -> Spans:
        """The characters of tokens [n, 2], for special tokens not those of their neighbours that they swallow."""
        lengths, widths = self._lengths[ids], tokens[:, 1] - tokens[:, 0]
        for i in np.flatnonzero((lengths > 0) & (widths > lengths)):
            if (start := text.find(self._texts[int(ids[i])], *tokens[i])) >= 0:
                tokens[i] = start, start + lengths[i]
        return tokens

    def prompt_ids(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Ids of a conversation that the assistant is to continue."""
        return self._tokenizer.encode_special(self.template.prompt(messages, tools))[0]

    def spells_special(self, messages: Sequence[Message]) -> bool:
        """Whether a message spells out a special token, which then is one."""
        return any(self._special.search(text) for text in _strings(messages))


def find_template(tokenizer: Tokenizer, wanted: str | None = None) -> ChatTemplate:
    """A chat template for a tokenizer.

    Args:
        tokenizer: of the model.
        wanted: None for the tokenizer's own, the name of a built-in one, or the path of a `.jinja` file.

    Raises:
        ConfigError: there is none, or its special tokens are not in the vocabulary.
        TemplateError: it is unusable.
    """
    roles, special = _token_roles(tokenizer), tuple(tokenizer.special_tokens)
    if wanted is None:
        name, source = _own_template(tokenizer)
    elif wanted in BUILTIN:
        name, source = wanted, BUILTIN[wanted].source
        if missing := [token for token in BUILTIN[wanted].needs if token not in special]:
            raise ConfigError(
                f"chat template {wanted}: the vocabulary lacks {', '.join(missing)}; "
                f"those that work with it: {', '.join(_fitting(tokenizer))}, or the path of a .jinja file"
            )
    else:
        name, source = wanted, _read_template(tokenizer, Path(wanted))
    return ChatTemplate(name, source, roles, special)


def _own_template(tokenizer: Tokenizer) -> tuple[str, str]:
    """Name and source of the template among a tokenizer's files."""
    files = {path.name: path for path in tokenizer.files}
    if path := files.get(CHAT_TEMPLATE):
        return str(path), _read_template(tokenizer, path)
    path = files.get("tokenizer_config.json")
    found = _configuration(tokenizer).get("chat_template")
    if isinstance(found, list):
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ConfigError(
            f"the tokenizer comes with no chat template; name one: {', '.join(_fitting(tokenizer))}, "
            f"or the path of a .jinja file"
        )
    return str(path), found


def _read_template(tokenizer: Tokenizer, path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(SOURCE_LIMIT + 1)  # no more than is needed to refuse it
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"chat template {str(path)!r}: {reason}; expected a .jinja file or one of: {', '.join(_fitting(tokenizer))}"
        ) from None


def _fitting(tokenizer: Tokenizer) -> list[str]:
    """The built-in templates whose special tokens a vocabulary has."""
    return [name for name, template in BUILTIN.items() if set(template.needs) <= tokenizer.special_tokens.keys()]


def _token_roles(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token`, `eos_token` ... as the tokenizer's configuration has them, else of its begin and end."""
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
    roles = {role: texts[i] for role, i in ids.items() if i is not None and i in texts}
    for role, token in _configuration(tokenizer).items():
        text = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(text, str):
            roles[role] = text
    _check_roles(roles)
    return roles


def _check_roles(roles: Mapping[str, str]) -> None:
    """A template may write them as often as it likes."""
    longest = max(roles, key=lambda role: len(roles[role]), default="")
    if longest and len(roles[longest]) > _LONGEST_ROLE:
        raise ConfigError(
            f"{longest} of tokenizer_config.json has {len(roles[longest]):,} characters, "
            f"expected a token of at most {_LONGEST_ROLE:,}"
        )
    if len(roles) > _MOST_ROLES:
        raise ConfigError(f"tokenizer_config.json names {len(roles):,} tokens, expected at most {_MOST_ROLES}")


def _configuration(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer_config.json`, which the tokenizer has read before."""
    path = next((path for path in tokenizer.files if path.name == "tokenizer_config.json"), None)
    content: dict[str, Any] = json.loads(path.read_bytes()) if path else {}
    return content


def _with_content(messages: Sequence[Message], k: int, content: str) -> list[Message]:
    return [{**message, "content": content} if i == k else message for i, message in enumerate(messages)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shared(texts: Sequence[str]) -> int:
    """How many characters all texts begin with."""
    first, last = min(texts), max(texts)  # in alphabetical order: what these two share, those between them do too
    return bisect.bisect_left(range(min(len(first), len(last))), True, key=lambda i: first[: i + 1] != last[: i + 1])


def _shares(tokens: Spans, spans: Spans) -> npt.NDArray[np.bool_]:
    """Which tokens share a character with one of `spans`, which are in order."""
    starts, ends = tokens.T
    i = np.searchsorted(spans[:, 1], starts, side="right")  # the first that ends behind the token's start
    shares = (starts < ends) & (i < len(spans))
    shares[shares] &= spans[i[shares], 0] < ends[shares]
    return np.asarray(shares)


def _merged(spans: Any) -> tuple[Span, ...]:
    """Spans in order, those that touch as one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _strings(value: Any) -> list[str]:
    """Every string in a message."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in _strings(item)]

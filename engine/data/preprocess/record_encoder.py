"""Encodes records of instruction data to token ids and target masks.

A record that cannot be used is rejected and counted by problem. It is never repaired, and it stops preprocessing only
if the template is unusable. The first token of a document is never a target, because nothing precedes it. Plain texts
have no beginning-of-text token, as in pretraining, and end with the end-of-document token.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from engine.data.chat.compiled import Message
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import ConversationError, TemplateError
from engine.data.chat.template import ChatTemplate, TrainOn
from engine.data.preprocess.blocks import LineBlock
from engine.data.preprocess.build import EncodedBlock
from engine.data.preprocess.json_lines import parse_json
from engine.data.preprocess.records import BadRecord, Conversation, Text, Tokens, parse_record
from engine.data.preprocess.rejects import Reject
from engine.data.storage.format import token_dtype
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError, DataError

OnTooLong = Literal["truncate", "drop", "split", "error"]
OUTCOMES = {
    "truncated": "too long, truncated to max_length",
    "dropped": "too long, dropped",
    "split": "too long, split",
    "windows": "parts without a target left out",
    "spelled": "spell a special token of the tokenizer",
}
OVER_BUDGET = "over the budget of the template"
MAX_RECORD_BYTES = 4 << 20  # per record; encoding one of this size takes a gigabyte
MAX_OVER_BUDGET = 100  # conversations, a fraction of a second each, before preprocessing gives up
_PROBE = '{"written as it is": 1e+0}'  # arguments of a tool call, of which `tojson` would change every part
TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Document = tuple[TokenIds, Mask]


@dataclass(frozen=True)
class Rules:
    """The turns that are targets, and the handling of conversations of more than `max_length` tokens (None: no limit).

    truncate keeps the first tokens; drop skips the conversation; split creates documents of `max_length` tokens and
    skips those without a target; error stops preprocessing.
    """

    train_on: TrainOn = "assistant"
    max_length: int | None = None
    on_too_long: OnTooLong = "truncate"


@dataclass
class SftBlock(EncodedBlock):
    """The encoded conversations of a block: one entry in `ids` and `lengths`, and the target mask.

    Attributes:
        formats: number of conversations kept, by format.
        problems: number of rejected records, by problem.
        outcome: number of conversations by outcome (see `OUTCOMES`); `template` counts those rendered with it.
    """

    mask: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))
    file: str = ""
    formats: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    outcome: Counter[str] = field(default_factory=Counter)

    def write(self, writers: Sequence[IndexedDatasetWriter]) -> None:
        writers[0].add_documents(self.ids[0], self.lengths[0], self.mask)


class RecordEncoder:
    """Encodes the records of a block; runs in a worker.

    Args:
        tokenizer: the model's tokenizer.
        chat: encodes conversations; or the error to raise at the first conversation if there is no template.
        rules: see `Rules`.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatEncoder | ConfigError, rules: Rules) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._rules = rules
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or r"(?!)")

    def __call__(self, block: LineBlock) -> SftBlock:
        encoded = SftBlock(block.position, [], len(block.data), file=block.source.path)
        if block.problem is not None:
            _reject(encoded, block, block.first_line, BadRecord("unreadable file", block.problem), b"")
        documents: list[Document] = []
        for number, line in [] if block.problem is not None else block.numbered_lines():
            try:
                documents += self._documents(line, encoded)
            except BadRecord as error:
                _reject(encoded, block, number, error, line)
                check_over_budget(encoded.problems, encoded.rejects[-1])
            except TooLong as error:
                raise DataError(f"{block.source.path}:{number}: {error}") from None
        ids = [ids for ids, _ in documents] or [np.zeros(0, np.int32)]
        encoded.ids.append(np.concatenate(ids).astype(self._dtype))
        encoded.lengths.append(np.array([mask.size for _, mask in documents], np.int32))
        encoded.mask = np.concatenate([mask for _, mask in documents] or [encoded.mask])
        return encoded

    def _documents(self, line: bytes, encoded: SftBlock) -> list[Document]:
        """Encode one record to its documents; none if the rules skip it."""
        if len(line) > MAX_RECORD_BYTES:
            raise BadRecord("too large", f"{len(line):,} bytes, expected at most {MAX_RECORD_BYTES:,}")
        name, content = parse_record(line)
        ids, mask = self._encode(content)
        mask[0] = False
        if not mask.any():
            raise BadRecord("no target", f"none of its {ids.size} tokens is a target")
        documents = _fit(ids, mask, self._rules, encoded.outcome)
        if documents:
            encoded.formats[name] += 1
            encoded.outcome["spelled"] += self._spells(content)
            encoded.outcome["template"] += isinstance(content, Conversation)
        return documents

    def _encode(self, content: Conversation | Text | Tokens) -> Document:
        """Return ids in the vocabulary, at least one, and their target mask."""
        if isinstance(content, Conversation):
            return self._conversation(content)
        if isinstance(content, Text):
            return self._text(content)
        wrong = next((i for i in content.ids if not 0 <= i < self._tokenizer.vocab_size), None)
        if wrong is not None:
            raise BadRecord("id outside the vocabulary", f"{wrong}; expected 0 .. {self._tokenizer.vocab_size - 1}")
        return np.array(content.ids, np.int32), np.array(content.target_mask, np.bool_)

    def _conversation(self, content: Conversation) -> Document:
        if isinstance(self._chat, ConfigError):
            raise self._chat
        train_on = self._rules.train_on
        if train_on != "all" and not content.answers:
            raise BadRecord("no assistant turn", f"none of its {len(content.messages)} turns has the role assistant")
        if train_on == "assistant":
            train_on = content.train_on
        content = _with_parsed_arguments(self._chat.template, content)
        try:
            _require_tools_written(self._chat.template, content)
            ids, mask = self._chat.encode(content.messages, train_on, content.tools)
        except ConversationError as error:
            raise BadRecord("refused by the template", str(error)) from None
        except TemplateError as error:  # a template that fails for every conversation was rejected earlier
            raise BadRecord(OVER_BUDGET, str(error)) from None
        if not ids.size:
            raise BadRecord("empty conversation", "the template writes nothing for it")
        return ids, mask

    def _text(self, content: Text) -> Document:
        """Encode a text. A token that spans the end of the prompt and the start of the completion is a target."""
        ids, spans = self._tokenizer.encode_special(content.prompt + content.completion)
        start = 0 if self._rules.train_on == "all" else len(content.prompt)
        targets = [stop > start for _, stop in spans]
        if not ids or ids[-1] != self._tokenizer.eod_id:
            ids, targets = [*ids, self._tokenizer.eod_id], [*targets, True]
        return np.array(ids, np.int32), np.array(targets, np.bool_)

    def _spells(self, content: Conversation | Text | Tokens) -> bool:
        if isinstance(content, Conversation):
            return isinstance(self._chat, ChatEncoder) and self._chat.spells_special(content.messages)
        return isinstance(content, Text) and bool(self._special.search(content.prompt + content.completion))


def _require_tools_written(template: ChatTemplate, content: Conversation) -> None:
    """Check that the template writes tools and their calls; otherwise the model would be trained on empty turns.

    Raises:
        BadRecord: the template drops them.
        ConversationError: the template cannot render the conversation.
    """
    callers = [i for i, message in enumerate(content.messages) if message.get("tool_calls")]
    if not callers and not content.tools:
        return
    text = template.render(content.messages, "all", content.tools).text
    for i in callers:
        caller = {key: value for key, value in content.messages[i].items() if key != "tool_calls"}
        without = [*content.messages[:i], caller, *content.messages[i + 1 :]]
        if _text_of(template, without, content.tools) == text:
            raise BadRecord("tools not written", f"the template drops the tool_calls of turn {i}")
    if content.tools and _text_of(template, content.messages, None) == text:
        raise BadRecord("tools not written", "the template drops the tools")


def _with_parsed_arguments(template: ChatTemplate, content: Conversation) -> Conversation:
    """Return the conversation with arguments of tool calls as objects, if they are JSON texts, as OpenAI writes them.

    Many templates write them with `tojson`, which would escape a text. A template that writes texts as they are keeps
    them, because an object would be written with other numbers, escapes and spaces; so does one that fails for objects.
    """

    def parsed(call: Any, probe: str | None) -> Any:
        if not isinstance(call, dict):
            return call
        if "function" in call:
            return {**call, "function": parsed(call["function"], probe)}
        try:
            arguments = parse_json(call["arguments"].encode(errors="replace"))
        except (KeyError, AttributeError, orjson.JSONDecodeError):
            return call
        return {**call, "arguments": probe or arguments} if isinstance(arguments, dict) else call

    def with_arguments(probe: str | None = None) -> list[Message]:
        return [
            {**message, "tool_calls": [parsed(call, probe) for call in calls]}
            if isinstance(calls := message.get("tool_calls"), list)
            else message
            for message in content.messages
        ]

    objects = with_arguments()
    if objects == content.messages or _PROBE in (_text_of(template, with_arguments(_PROBE), content.tools) or ""):
        return content
    return content if _text_of(template, objects, content.tools) is None else replace(content, messages=objects)


def _text_of(template: ChatTemplate, messages: list[Message], tools: list[Any] | None) -> str | None:
    try:
        return template.render(messages, "all", tools).text
    except ConversationError:
        return None


class TooLong(Exception):
    """A conversation is too long, with `on_too_long` = error."""


def _reject(encoded: SftBlock, block: LineBlock, number: int, error: BadRecord, line: bytes) -> None:
    encoded.rejects.append(block.reject(number, str(error), line))
    encoded.problems[error.problem] += 1


def check_over_budget(problems: Counter[str], last: Reject) -> None:
    """Check that the template has not exceeded its budget for too many conversations.

    Args:
        problems: counts of one block, or of all blocks so far.
        last: the last rejected record.

    Raises:
        DataError: it has, for `MAX_OVER_BUDGET` or more.
    """
    if problems[OVER_BUDGET] >= MAX_OVER_BUDGET and last.reason.startswith(OVER_BUDGET):
        raise DataError(
            f"{problems[OVER_BUDGET]:,} conversations are {OVER_BUDGET}; {last}; "
            f"choose another chat_template, or remove these conversations"
        )


def _fit(ids: TokenIds, mask: Mask, rules: Rules, outcome: Counter[str]) -> list[Document]:
    """Apply the rules for long conversations. Return the documents of a conversation.

    Raises:
        BadRecord: none of the documents has a target.
        TooLong: the conversation is too long, with `on_too_long` = error.
    """
    limit = rules.max_length
    if limit is None or ids.size <= limit:
        return [(ids, mask)]
    if rules.on_too_long == "error":
        raise TooLong(
            f"{ids.size:,} tokens, more than max_length = {limit:,}; on_too_long can be truncate, drop or split"
        )
    if rules.on_too_long == "drop":
        outcome["dropped"] += 1
        return []
    if rules.on_too_long == "truncate":
        documents = [(ids[:limit], mask[:limit])]
    else:
        starts = range(0, ids.size, limit)
        mask[starts] = False  # nothing precedes the first token of a document
        documents = [(ids[i : i + limit], mask[i : i + limit]) for i in starts]
    kept = [(ids, mask) for ids, mask in documents if mask.any()]
    if not kept:
        raise BadRecord("no target when cut", f"no target in {limit:,} tokens of {ids.size:,}")
    outcome["truncated" if rules.on_too_long == "truncate" else "split"] += 1
    outcome["windows"] += len(documents) - len(kept)
    return kept

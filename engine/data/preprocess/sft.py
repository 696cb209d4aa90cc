"""Conversations to fine-tuning datasets: the tokens, which of them are learned, and what became of the rest.

A record that cannot be used is rejected and counted under the name of its problem, never repaired and never an end of
the work, unless it is the template that is of no use. The first token of a document is never a target, as nothing
stands before it to predict it from.

Plain texts begin with no beginning-of-text token, as in pretraining, and end with the end of document.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.data.chat.compiled import Message
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import ConversationError, TemplateError
from engine.data.chat.template import ChatTemplate, TrainOn
from engine.data.preprocess.documents import Block, Reject, Source, numbered_lines, reject
from engine.data.preprocess.pretrain import Counts, EncodedBlock, dataset_info, filled, source_names
from engine.data.preprocess.records import FORMATS, BadRecord, Conversation, Text, Tokens, parse_record
from engine.data.storage.format import token_dtype
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError, DataError

OnTooLong = Literal["truncate", "drop", "split", "error"]
OUTCOMES = {
    "truncated": "too long, cut to the first tokens",
    "dropped": "too long, dropped",
    "split": "too long, split",
    "windows": "pieces without a target left out",
    "spelled": "spell a special token of the tokenizer",
}

TOO_MUCH = "too much for the template"
MOST_BYTES = 4 << 20  # of a record: its tokens take a gigabyte while they are made
MOST_RUNAWAYS = 100  # conversations that are too much, each a fraction of a second, before the template is given up

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Document = tuple[Ids, Mask]


@dataclass(frozen=True)
class Rules:
    """What is learned, and what happens to conversations of more than `max_length` tokens (None: any is fine).

    truncate keeps the first tokens; drop leaves the conversation out; split makes documents of `max_length` tokens, of
    which those without a target are left out; error ends the work.
    """

    train_on: TrainOn = "assistant"
    max_length: int | None = None
    on_too_long: OnTooLong = "truncate"


@dataclass
class SupervisedBlock(EncodedBlock):
    """A block's conversations: one entry in `ids` and `lengths`, and the mask that belongs to it.

    Attributes:
        formats: conversations kept, by format.
        problems: rejected records, by problem.
        outcome: conversations by what happened to them, see `OUTCOMES`, and those that needed the `template`.
    """

    mask: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))
    file: str = ""
    formats: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    outcome: Counter[str] = field(default_factory=Counter)

    def write(self, writers: Sequence[IndexedDatasetWriter]) -> None:
        writers[0].add_documents(self.ids[0], self.lengths[0], self.mask)


@dataclass
class SupervisedCounts(Counts):
    """As `SupervisedBlock` has them; `formats` by file. `num_bytes` is of the records."""

    learned: int = 0
    formats: dict[str, Counter[str]] = field(default_factory=dict)
    problems: Counter[str] = field(default_factory=Counter)
    outcome: Counter[str] = field(default_factory=Counter)

    def add(self, block: EncodedBlock) -> None:
        assert isinstance(block, SupervisedBlock)
        super().add(block)
        self.learned += int(block.mask.sum())
        self.formats.setdefault(block.file, Counter()).update(block.formats)
        self.problems += block.problems
        self.outcome += block.outcome

    @property
    def conversations(self) -> int:
        """Those kept; fewer than documents where some were split."""
        return sum(formats.total() for formats in self.formats.values())


class SupervisedEncoder:
    """What a worker does with a block.

    Args:
        tokenizer: of the model.
        chat: its encoder of conversations, or why there is none, which only matters where there are conversations.
        rules: see there.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatEncoder | ConfigError, rules: Rules) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._rules = rules
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or r"(?!)")

    def __call__(self, block: Block) -> SupervisedBlock:
        encoded = SupervisedBlock(block.position, [], len(block.data), file=block.source.path)
        if block.problem is not None:
            _refuse(encoded, block, block.first_line, BadRecord("unreadable file", block.problem), b"")
        documents: list[Document] = []
        for number, line in [] if block.problem is not None else numbered_lines(block):
            try:
                documents += self._documents(line, encoded)
            except BadRecord as error:
                _refuse(encoded, block, number, error, line)
                _check_runaways(encoded.problems, encoded.rejects[-1])
            except TooLong as error:
                raise DataError(f"{block.source.path}:{number}: {error}") from None
        ids = [ids for ids, _ in documents] or [np.zeros(0, np.int32)]
        encoded.ids.append(np.concatenate(ids).astype(self._dtype))
        encoded.lengths.append(np.array([mask.size for _, mask in documents], np.int32))
        encoded.mask = np.concatenate([mask for _, mask in documents] or [encoded.mask])
        return encoded

    def _documents(self, line: bytes, encoded: SupervisedBlock) -> list[Document]:
        """Of one record; none where the rules leave it out."""
        if len(line) > MOST_BYTES:
            raise BadRecord("too large", f"{len(line):,} bytes, expected at most {MOST_BYTES:,}")
        name, content = parse_record(line)
        ids, mask = self._encode(content)
        mask[0] = False
        if not mask.any():
            raise BadRecord("nothing to learn", f"none of its {ids.size} tokens is a target")
        documents = _fit(ids, mask, self._rules, encoded.outcome)
        if documents:
            encoded.formats[name] += 1
            encoded.outcome["spelled"] += self._spells(content)
            encoded.outcome["template"] += isinstance(content, Conversation)
        return documents

    def _encode(self, content: Conversation | Text | Tokens) -> Document:
        """Ids inside the vocabulary, at least one, and their mask."""
        if isinstance(content, Conversation):
            return self._conversation(content)
        if isinstance(content, Text):
            return self._text(content)
        wrong = next((i for i in content.ids if not 0 <= i < self._tokenizer.vocab_size), None)
        if wrong is not None:
            raise BadRecord("id outside the vocabulary", f"{wrong}; expected 0 .. {self._tokenizer.vocab_size - 1}")
        return np.array(content.ids, np.int32), np.array(content.learned, np.bool_)

    def _conversation(self, content: Conversation) -> Document:
        if isinstance(self._chat, ConfigError):
            raise self._chat
        train_on = self._rules.train_on
        if train_on != "all" and not content.answers:
            raise BadRecord("no assistant turn", f"{len(content.messages)} turns, none of them of the assistant")
        if train_on == "assistant":
            train_on = content.learned
        try:
            _require_tools_written(self._chat.template, content)
            ids, mask = self._chat.encode(content.messages, train_on, content.tools)
        except ConversationError as error:
            raise BadRecord("refused by the template", str(error)) from None
        except TemplateError as error:  # a template that fails for all has failed before
            raise BadRecord(TOO_MUCH, str(error)) from None
        if not ids.size:
            raise BadRecord("empty conversation", "the template makes nothing of it")
        return ids, mask

    def _text(self, content: Text) -> Document:
        """A token that reaches from the prompt into the completion is learned."""
        ids, spans = self._tokenizer.encode_special(content.prompt + content.completion)
        start = 0 if self._rules.train_on == "all" else len(content.prompt)
        learned = [stop > start for _, stop in spans]
        if not ids or ids[-1] != self._tokenizer.eod_id:
            ids, learned = [*ids, self._tokenizer.eod_id], [*learned, True]
        return np.array(ids, np.int32), np.array(learned, np.bool_)

    def _spells(self, content: Conversation | Text | Tokens) -> bool:
        if isinstance(content, Conversation):
            return isinstance(self._chat, ChatEncoder) and self._chat.spells_special(content.messages)
        return isinstance(content, Text) and bool(self._special.search(content.prompt + content.completion))


def _require_tools_written(template: ChatTemplate, content: Conversation) -> None:
    """A template that leaves out tools and their calls would teach the assistant to answer with nothing.

    Raises:
        BadRecord: it does.
        ConversationError: it refuses the conversation.
    """
    callers = [i for i, message in enumerate(content.messages) if message.get("tool_calls")]
    if not callers and not content.tools:
        return
    text = template.render(content.messages, "all", content.tools).text
    for i in callers:
        caller = {key: value for key, value in content.messages[i].items() if key != "tool_calls"}
        without = [*content.messages[:i], caller, *content.messages[i + 1 :]]
        if _text_of(template, without, content.tools) == text:
            raise BadRecord("tools not written", f"the template leaves out the tool_calls of turn {i}")
    if content.tools and _text_of(template, content.messages, None) == text:
        raise BadRecord("tools not written", "the template leaves out the tools")


def _text_of(template: ChatTemplate, messages: list[Message], tools: list[Any] | None) -> str | None:
    try:
        return template.render(messages, "all", tools).text
    except ConversationError:
        return None


class TooLong(Exception):
    """A conversation that the rules end the work for."""


def _refuse(encoded: SupervisedBlock, block: Block, number: int, error: BadRecord, line: bytes) -> None:
    encoded.rejects.append(reject(block, number, str(error), line))
    encoded.problems[error.problem] += 1


def _check_runaways(problems: Counter[str], last: Reject) -> None:
    """Whether the template is of use, seen from the problems of a block, or of all so far.

    Raises:
        DataError: it is not.
    """
    if problems[TOO_MUCH] >= MOST_RUNAWAYS and last.reason.startswith(TOO_MUCH):
        raise DataError(
            f"{problems[TOO_MUCH]:,} conversations are {TOO_MUCH}; {last}; "
            f"name another one with --chat-template, or leave such conversations out"
        )


def _fit(ids: Ids, mask: Mask, rules: Rules, outcome: Counter[str]) -> list[Document]:
    """The documents that the rules make of a conversation.

    Raises:
        BadRecord: none of them has a target.
        TooLong: see there.
    """
    limit = rules.max_length
    if limit is None or ids.size <= limit:
        return [(ids, mask)]
    if rules.on_too_long == "error":
        raise TooLong(
            f"{ids.size:,} tokens, more than --max-length {limit:,}; --on-too-long can be truncate, drop or split"
        )
    if rules.on_too_long == "drop":
        outcome["dropped"] += 1
        return []
    if rules.on_too_long == "truncate":
        documents = [(ids[:limit], mask[:limit])]
    else:
        starts = range(0, ids.size, limit)
        mask[starts] = False  # each is a document now
        documents = [(ids[i : i + limit], mask[i : i + limit]) for i in starts]
    kept = [(ids, mask) for ids, mask in documents if mask.any()]
    if not kept:
        raise BadRecord("nothing to learn when cut", f"no target in {limit:,} tokens of {ids.size:,}")
    outcome["truncated" if rules.on_too_long == "truncate" else "split"] += 1
    outcome["windows"] += len(documents) - len(kept)
    return kept


def sft_prefix(output_prefix: str) -> Path:
    """The name of the dataset."""
    return Path(f"{output_prefix}_sft")


def preprocess_conversations(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: ChatTemplate | ConfigError,
    output_prefix: str,
    rules: Rules,
    *,
    workers: int,
    on_reject: Callable[[Reject], None] = lambda reject: None,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> SupervisedCounts:
    """Write the dataset `sft_prefix(output_prefix)` with a mask, a document a conversation; all of it or nothing.

    Args:
        sources: see `find_sources`, with `RECORDS`.
        template: for conversations, or why there is none.
        rules: see there.
        on_reject: told of each rejected record; may raise.
        on_progress: told of the counts after each block.

    Raises:
        ConfigError: there are conversations and no template for them.
        DataError: nothing is left to learn, a conversation is too long and the rules say error, or too many are too
            much for the template.
        WorkerFailed: a worker process was killed.
    """
    counts = SupervisedCounts()

    def noticed(reject: Reject) -> None:
        on_reject(reject)
        _check_runaways(counts.problems, reject)

    writer = IndexedDatasetWriter(sft_prefix(output_prefix), token_dtype(tokenizer.vocab_size), masked=True)
    chat = template if isinstance(template, ConfigError) else ChatEncoder(tokenizer, template)
    encode = SupervisedEncoder(tokenizer, chat, rules)
    advice = f"expected objects with one of {', '.join('+'.join(keys) for keys in FORMATS.values())}"
    with filled([writer], sources, encode, output_prefix, counts, workers, noticed, on_progress, advice):
        if not counts.learned:
            what = "; ".join(describe(counts)) or "no records"
            raise DataError(f"nothing to learn in {source_names(sources)}: {what}")
        writer.info = dataset_info(tokenizer, sources, counts)
        if counts.outcome["template"] and isinstance(chat, ChatEncoder) and isinstance(template, ChatTemplate):
            used = {"chat_template": template.source, "end_of_turn_id": chat.end_of_turn_id}
            writer.info = writer.info.model_copy(update=used)
    return counts


def describe(counts: SupervisedCounts) -> list[str]:
    """What happened to conversations, one sentence each, for a person."""
    rejected = sorted(counts.problems.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{count:,} rejected: {problem}" for problem, count in rejected]
    return told + [f"{counts.outcome[name]:,} {text}" for name, text in OUTCOMES.items() if counts.outcome[name]]

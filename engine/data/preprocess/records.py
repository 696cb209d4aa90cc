"""Parses records of instruction data in the published formats to conversations, texts or tokens.

Pure functions of one line of JSON. The keys of a record determine its format; values are not used to guess it. An
invalid record raises `BadRecord` with one of a few `problem` names, by which rejects are counted. Alternative
considered: one format per run, chosen by a setting; a mixed collection would lose every record of another format.

ShareGPT's `function_call` turns become assistant turns with their text unchanged, so they are targets with any
template; OpenAI's `tool_calls` are passed to the template, which may have a format for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from engine.data.chat.compiled import Message
from engine.data.preprocess.json_lines import parse_json

FORMATS: dict[str, tuple[str, ...]] = {  # the keys that identify each format, checked in this order
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {  # role in the data: role in templates
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
SPOKEN = ("user", "assistant")  # roles whose turns must not be empty; tool results may be
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
IGNORE_INDEX = -100  # in `labels`: not a target, as in torch's cross_entropy


class BadRecord(ValueError):
    """A record that cannot be used. Rejects are counted by `problem`; the message has the details."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.problem = problem


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template. `train_on` is "last" if only the last assistant turn of the record is a target."""

    messages: list[Message]
    tools: list[Any] | None = None
    train_on: Literal["assistant", "last"] = "assistant"

    @property
    def answers(self) -> int:
        return _answers(self.messages)


@dataclass(frozen=True)
class Text:
    """A text; the target is `completion`."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """Token ids from an earlier tokenization and their target mask."""

    ids: list[int]
    target_mask: list[bool]


def parse_record(line: bytes) -> tuple[str, Conversation | Text | Tokens]:
    """Parse one record. Return the name of its format (a key of `FORMATS`) and its content.

    Raises:
        BadRecord: an unknown format, or an invalid value.
    """
    try:
        record = parse_json(line)
    except orjson.JSONDecodeError as error:
        raise BadRecord("not JSON", f"{error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise BadRecord("not an object", f"it is {_kind(record)}")
    name = _format(record)
    if name == "tokens":
        return name, _tokens(record)
    if name == "text":
        return name, Text("", _spoken(record["text"], "text"))
    if name == "prompt/completion":
        return name, _completion(record)
    turns = _alpaca(record) if name == "alpaca" else _messages(record[FORMATS[name][0]], FORMATS[name][0])
    return name, Conversation(_system(record) + turns, _tools(record))


def _format(record: Mapping[str, Any]) -> str:
    for name, keys in FORMATS.items():
        if all(record.get(key) is not None for key in keys):
            return name
    for keys in FORMATS.values():
        if all(key in record for key in keys):
            raise BadRecord("null content", " and ".join(key for key in keys if record[key] is None) + " is null")
    known = ", ".join("+".join(keys) for keys in FORMATS.values())
    raise BadRecord("unknown format", f"keys {', '.join(map(repr, list(record)[:8])) or 'none'}; expected {known}")


def _messages(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise BadRecord("wrong type", f"{key} holds {_kind(turns)}, expected a list of turns")
    if not turns:
        raise BadRecord("empty conversation", f"{key} has no turn")
    return [_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    """Parse one turn of OpenAI's or ShareGPT's format; other keys are passed to the template, except nulls."""
    if not isinstance(turn, dict):
        raise BadRecord("wrong type", f"{where} is {_kind(turn)}, expected an object with a role and a content")
    rest = {key: value for key, value in turn.items() if value is not None}
    role = _role(rest.pop("role", rest.pop("from", None)), where)
    content = rest.pop("content", rest.pop("value", None))
    if content is None and rest.get("tool_calls"):
        content = ""
    text = _content(content, where)
    if role in SPOKEN and not text.strip() and not rest.get("tool_calls"):
        raise BadRecord("empty turn", f"{where}, of the {role}, says nothing")
    return {"role": role, "content": text, **rest}


def _role(role: Any, where: str) -> str:
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        expected = "system, user, assistant, tool, or ShareGPT's names"
        raise BadRecord("unknown role", f"{where} has role {str(role)[:40]!r}; expected {expected}")
    return known


def _content(content: Any, where: str) -> str:
    """Return a text, or the concatenated texts of OpenAI's list of parts."""
    if not isinstance(content, list):
        return _text(content, f"the content of {where}")
    for part in content:
        if not isinstance(part, dict):
            raise BadRecord("wrong type", f"the content of {where} has {_kind(part)} among its parts")
        if part.get("type") != "text":
            raise BadRecord("no text", f"{where} has a part of type {str(part.get('type'))[:40]!r}, not text")
    return "".join(_text(part.get("text"), f"a part of {where}") for part in content)


def _system(record: Mapping[str, Any]) -> list[Message]:
    """Return the record's separate system prompt as a message, if it is not empty."""
    system = record.get("system")
    text = "" if system is None else _text(system, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools, given as a list or as a JSON string (in datasets whose columns have one type)."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools.strip() or "null")
        except orjson.JSONDecodeError as error:
            raise BadRecord("wrong type", f"tools is a string that is not JSON: {error.msg}") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRecord("wrong type", f"tools holds {_kind(tools)}, expected a list")
    return tools or None


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    """Parse Alpaca's format; instruction and input form one user turn, separated by a blank line."""
    turns: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise BadRecord("wrong type", f"history holds {_kind(history)}, expected a list of pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord("wrong type", f"history[{i}] is {_kind(pair)}, expected a question and its answer")
        turns += _exchange(*(_spoken(text, f"history[{i}]") for text in pair))
    asked = [_text(record[key], key) for key in ("instruction", "input") if record.get(key) is not None]
    question = _spoken("\n\n".join(text for text in asked if text.strip()), "instruction")
    return turns + _exchange(question, _spoken(record["output"], "output"))


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _completion(record: Mapping[str, Any]) -> Conversation | Text:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(completion, list):
        return Text(_text(prompt, "prompt"), _spoken(completion, "completion"))
    before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
    if _answers(before) and _answers(after) > 1:
        raise BadRecord("unclear target", "answers in the prompt and several in the completion; write it as messages")
    train_on: Literal["assistant", "last"] = "last" if _answers(before) else "assistant"
    return Conversation(_system(record) + before + after, _tools(record), train_on)


def _tokens(record: Mapping[str, Any]) -> Tokens:
    ids = _integers(record["input_ids"], "input_ids")
    if not ids:
        raise BadRecord("empty conversation", "input_ids is empty")
    key = next((key for key in ("labels", *MASKS) if record.get(key) is not None), None)
    if key is None:
        raise BadRecord("no mask", f"input_ids without labels, {', '.join(MASKS)}: nothing marks the targets")
    marks = _integers(record[key], key)
    if len(marks) != len(ids):
        raise BadRecord("different lengths", f"{len(ids)} input_ids, {len(marks)} entries in {key}")
    if key != "labels":
        if not set(marks) <= {0, 1}:
            raise BadRecord("wrong type", f"{key} has {max(marks, key=abs)}, expected 0 and 1")
        return Tokens(ids, [mark == 1 for mark in marks])
    for i, (token, label) in enumerate(zip(ids, marks, strict=True)):
        if label not in (token, IGNORE_INDEX):
            detail = f"labels[{i}] = {label} where input_ids has {token}; expected the same (not shifted), or -100"
            raise BadRecord("different labels", detail)
    return Tokens(ids, [label != IGNORE_INDEX for label in marks])


def _integers(values: Any, key: str) -> list[int]:
    """Check a list of integers; Booleans are allowed only in masks."""
    kinds = (int, bool) if key in MASKS else (int,)
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise BadRecord("wrong type", f"{key} holds {_kind(values)}, expected a list of integers")
    return values


def _spoken(value: Any, where: str) -> str:
    """Check a text that must not be empty."""
    text = _text(value, where)
    if not text.strip():
        raise BadRecord("empty turn", f"{where} says nothing")
    return text


def _text(value: Any, where: str) -> str:
    if value is None:
        raise BadRecord("null content", f"{where} is null or missing")
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"{where} holds {_kind(value)}, expected text")
    return value


def _answers(messages: Sequence[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"

"""Records of instruction data, in any of the shapes they are published in, as what can be encoded.

Pure functions of one line of JSON. Each record says by its own keys which shape it has; nothing is guessed from
values. What is wrong with a record is a `BadRecord`, whose `problem` is one of a few names to count by. Rejected: one
format a run, named by a flag, with which a mixed collection loses whatever is not of that format.

`function_call` turns of ShareGPT are turns of the assistant with their text as it stands, so that they are learned
under any template; `tool_calls` of OpenAI's messages go to the template, which may know how its model writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from engine.data.chat.compiled import Message

FORMATS: dict[str, tuple[str, ...]] = {  # the keys that tell, looked for in this order
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {  # as written in data: as templates have it
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
SPOKEN = ("user", "assistant")  # roles whose turns must not be empty; a tool may well answer nothing
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
NOT_LEARNED = -100  # in `labels`, as torch's cross_entropy has it


class BadRecord(ValueError):
    """A record that nothing can be learned from as it stands. `problem` is its kind, the text is for a person."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.problem = problem


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template. `learned` says less than all assistant turns where the record does."""

    messages: list[Message]
    tools: list[Any] | None = None
    learned: Literal["assistant", "last"] = "assistant"

    @property
    def answers(self) -> int:
        return _answers(self.messages)


@dataclass(frozen=True)
class Text:
    """`prompt` is read, `completion` is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """Ids that somebody else has made; `learned` has one entry each."""

    ids: list[int]
    learned: list[bool]


def parse_record(line: bytes) -> tuple[str, Conversation | Text | Tokens]:
    """The name of a record's format, a key of `FORMATS`, and its content.

    Raises:
        BadRecord: it has none of them, or something in it is wrong.
    """
    try:
        record = orjson.loads(line)
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
    """One turn of OpenAI's or ShareGPT's kind; whatever else it has goes to the template, but for nulls."""
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
    """A text, or the texts of OpenAI's list of parts one after another."""
    if not isinstance(content, list):
        return _text(content, f"the content of {where}")
    for part in content:
        if not isinstance(part, dict):
            raise BadRecord("wrong type", f"the content of {where} has {_kind(part)} among its parts")
        if part.get("type") != "text":
            raise BadRecord("no text", f"{where} has a part of type {str(part.get('type'))[:40]!r}, not text")
    return "".join(_text(part.get("text"), f"a part of {where}") for part in content)


def _system(record: Mapping[str, Any]) -> list[Message]:
    """A system prompt beside the turns, which an empty text is not."""
    system = record.get("system")
    text = "" if system is None else _text(system, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """A list of tools, or its JSON in a text, as datasets with one type a column have it."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools.strip() or "null")
        except orjson.JSONDecodeError as error:
            raise BadRecord("wrong type", f"tools is a text that is not JSON: {error.msg}") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRecord("wrong type", f"tools holds {_kind(tools)}, expected a list")
    return tools or None


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    """Instruction and input are one turn of the user, a blank line between them."""
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
    learned: Literal["assistant", "last"] = "last" if _answers(before) else "assistant"
    return Conversation(_system(record) + before + after, _tools(record), learned)


def _tokens(record: Mapping[str, Any]) -> Tokens:
    ids = _whole_numbers(record["input_ids"], "input_ids")
    if not ids:
        raise BadRecord("empty conversation", "input_ids is empty")
    key = next((key for key in ("labels", *MASKS) if record.get(key) is not None), None)
    if key is None:
        raise BadRecord("no mask", f"input_ids without labels, {', '.join(MASKS)}: nothing says what to learn")
    marks = _whole_numbers(record[key], key)
    if len(marks) != len(ids):
        raise BadRecord("different lengths", f"{len(ids)} input_ids, {len(marks)} entries in {key}")
    if key != "labels":
        if not set(marks) <= {0, 1}:
            raise BadRecord("wrong type", f"{key} has {max(marks, key=abs)}, expected 0 and 1")
        return Tokens(ids, [mark == 1 for mark in marks])
    for i, (token, label) in enumerate(zip(ids, marks, strict=True)):
        if label not in (token, NOT_LEARNED):
            detail = f"labels[{i}] = {label} where input_ids has {token}; expected the same (not shifted), or -100"
            raise BadRecord("different labels", detail)
    return Tokens(ids, [label != NOT_LEARNED for label in marks])


def _whole_numbers(values: Any, key: str) -> list[int]:
    """Truth values count as 0 and 1 in masks, and as nothing in ids."""
    kinds = (int, bool) if key in MASKS else (int,)
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise BadRecord("wrong type", f"{key} holds {_kind(values)}, expected a list of whole numbers")
    return values


def _spoken(value: Any, where: str) -> str:
    """A text that must not be empty."""
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

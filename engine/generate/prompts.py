"""Prompts from a JSONL file, and the file of their answers, from which an interrupted run resumes.

One object a line, with `prompt` (a text) or `messages` (a conversation). The answer to a line is the same object with
more fields, in the same order, so the number of answers is where to resume. All lines are checked before the first is
answered: a bad last line must not cost a night. A file beside the answers keeps the settings they were made with, so
that those of two models are never mixed. Alternative considered: a progress file, which can disagree with the answers.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from engine.data.chat.compiled import Message
from engine.errors import ConfigError, DataError

SETTINGS_SUFFIX = ".settings.json"
ANSWER_FIELDS = ("completion", "num_tokens", "stopped", "error")


def read_prompts(path: Path, *, chat: bool) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped.

    Args:
        chat: allow `messages`; a `prompt` is then a conversation of one user message.

    Raises:
        ConfigError: the file cannot be read.
        DataError: naming the first line that is not a prompt; or there is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_checked(orjson.loads(line), chat=chat))
            except ValueError as problem:  # JSONDecodeError is one
                raise DataError(
                    f"{path}, line {number}: {problem}; it starts {line[:60].decode(errors='replace')!r}"
                ) from None
    if not prompts:
        raise DataError(f'{path} holds no prompts; expected an object a line, as in {{"prompt": "..."}}')
    return prompts


def conversation(prompt: Mapping[str, Any], system: str | None = None) -> list[Message]:
    """The messages of a line, `system` put before them unless they begin with a system message."""
    messages: list[Message] = prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}]
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


class AnswerFile:
    """Answers to `prompts`, one line each, in their order. Opening it keeps those of an interrupted run.

    Args:
        settings: what answers depend on beside their prompts, as JSON values; kept in PATH.settings.json.

    Attributes:
        answered: how many prompts have an answer.

    Raises:
        ConfigError: the file cannot be written, or its answers were made with other settings.
        DataError: it holds anything but answers to these prompts.
    """

    def __init__(self, path: Path, prompts: list[dict[str, Any]], settings: Mapping[str, Any]) -> None:
        try:
            self._file = path.open("r+b" if path.exists() else "x+b")
        except OSError as error:
            raise ConfigError(f"cannot write the answers to {path}: {error.strerror}") from None
        self.answered = 0
        complete = 0
        for line in self._file:
            if not line.endswith(b"\n"):  # the writer was interrupted
                break
            if self.answered == len(prompts) or not _answers(line, prompts[self.answered]):
                raise DataError(
                    f"{path}, line {self.answered + 1} is not the answer to prompt {self.answered + 1} of the input; "
                    f"name another output file, or remove this one"
                )
            self.answered, complete = self.answered + 1, complete + len(line)
        _keep_settings(path, settings, answered=self.answered > 0)
        self._file.seek(complete)
        self._file.truncate()

    def write(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Append the answers to the next prompts; they are on the disk when this returns."""
        lines = [orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE) for answer in answers]
        _write(self._file, b"".join(lines))
        self.answered += len(lines)

    def close(self) -> None:
        self._file.close()


def _keep_settings(path: Path, settings: Mapping[str, Any], *, answered: bool) -> None:
    """Write the settings before the first answer; with answers there, require the same settings."""
    beside = path.with_name(path.name + SETTINGS_SUFFIX)
    advice = "name another output file, or remove this one"
    try:
        if not answered:
            with beside.open("wb") as file:
                _write(file, orjson.dumps(settings, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            return
        before = orjson.loads(beside.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} needs {beside}, what its answers are made with: {error.strerror}; {advice}"
        ) from None
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{beside} does not say what the answers were made with: {error}; {advice}") from None
    before = before if isinstance(before, dict) else {}
    for name, value in settings.items():
        if name not in before or before[name] != value:
            made = f"{name} = {_shown(before.get(name))}"
            raise ConfigError(f"{path} has answers made with {made}, and this is {_shown(value)}; {advice}")


def _shown(value: Any) -> str:
    return "none" if value is None else orjson.dumps(value).decode()


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _checked(prompt: Any, *, chat: bool) -> dict[str, Any]:
    """The prompt itself.

    Raises:
        ValueError: why it is not one.
    """
    if not isinstance(prompt, dict):
        raise ValueError(f"expected an object, not a {type(prompt).__name__}")
    if taken := [name for name in ANSWER_FIELDS if name in prompt]:
        raise ValueError(f"the field {taken[0]!r} is reserved for the answer; rename it")
    if ("prompt" in prompt) == ("messages" in prompt):
        raise ValueError(f'expected either "prompt" or "messages", found the fields {list(prompt)}')
    if "messages" in prompt:
        if not chat:
            raise ValueError('"messages" need chat mode')
        _check_messages(prompt["messages"])
    elif not isinstance(prompt["prompt"], str) or not prompt["prompt"]:
        raise ValueError('"prompt" is not a text, or empty')
    try:
        orjson.dumps(prompt)  # now, and not when its answer is written
    except TypeError as error:
        raise ValueError(str(error)) from None
    return prompt


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list, or empty')
    for message in messages:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(field, str) for field in fields):
            raise ValueError('a message is an object with "role" and "content", both texts')
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's: there is nothing to answer")


def _answers(line: bytes, prompt: Mapping[str, Any]) -> bool:
    try:
        answer = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(answer, dict):
        return False
    rest = {name: value for name, value in answer.items() if name not in ANSWER_FIELDS}
    return rest == prompt and len(rest) < len(answer)

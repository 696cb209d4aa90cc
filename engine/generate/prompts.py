"""Reads prompts from a JSONL file and writes their answers to another, from which an interrupted run resumes.

One object per line, with `prompt` (a text) or `messages` (a conversation). The answer to a line is the same object with
additional fields. Answers are in the order of the prompts, so their number tells where to resume. All lines are checked
before the first is answered, so that a run does not fail at an invalid last line. A file next to the answers stores
their settings, so that answers of two models are never mixed. Alternative considered: a progress file, which can
disagree with the answers.
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
    """Read the objects of a JSONL file; blank lines are skipped.

    Args:
        chat: allow `messages`; a `prompt` is then a conversation of one user message.

    Raises:
        ConfigError: the file cannot be read.
        DataError: names the first line that is not a prompt; or there are no prompts.
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
        raise DataError(f'{path} has no prompts; expected one object per line, as in {{"prompt": "..."}}')
    return prompts


def conversation(prompt: Mapping[str, Any], system: str | None = None) -> list[Message]:
    """Return the messages of a line, after the system message `system` unless they begin with one."""
    messages: list[Message] = prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}]
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


class AnswerFile:
    """The file of answers to `prompts`, one line each, in order. Opening it keeps the answers of an interrupted run.

    Args:
        settings: settings that answers depend on, as JSON values; stored in PATH.settings.json.

    Attributes:
        answered: number of prompts with an answer.

    Raises:
        ConfigError: the file cannot be written, or its answers were made with other settings.
        DataError: it contains lines that are not answers to these prompts.
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
        """Append the answers to the next prompts and sync them to disk."""
        lines = [orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE) for answer in answers]
        _write(self._file, b"".join(lines))
        self.answered += len(lines)

    def close(self) -> None:
        self._file.close()


def _keep_settings(path: Path, settings: Mapping[str, Any], *, answered: bool) -> None:
    """Write the settings before the first answer; if there are answers, require the same settings."""
    settings_path = path.with_name(path.name + SETTINGS_SUFFIX)
    advice = "name another output file, or remove this one"
    try:
        if not answered:
            with settings_path.open("wb") as file:
                _write(file, orjson.dumps(settings, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            return
        before = orjson.loads(settings_path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} needs {settings_path}, the settings of its answers: {error.strerror}; {advice}"
        ) from None
    except orjson.JSONDecodeError as error:
        raise ConfigError(
            f"{settings_path} is not JSON, expected the settings of the answers: {error}; {advice}"
        ) from None
    before = before if isinstance(before, dict) else {}
    for name, value in settings.items():
        if name not in before or before[name] != value:
            made = f"{name} = {_shown(before.get(name))}"
            raise ConfigError(f"{path} has answers made with {made}, expected {_shown(value)}; {advice}")


def _shown(value: Any) -> str:
    return "none" if value is None else orjson.dumps(value).decode()


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _checked(prompt: Any, *, chat: bool) -> dict[str, Any]:
    """Check a prompt and return it.

    Raises:
        ValueError: with the problem.
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
        raise ValueError('"prompt" is empty or not a text')
    try:
        orjson.dumps(prompt)  # fail now, not when its answer is written
    except TypeError as error:
        raise ValueError(str(error)) from None
    return prompt


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is empty or not a list')
    for message in messages:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(field, str) for field in fields):
            raise ValueError('a message is an object with "role" and "content", both texts')
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message has the role assistant: there is nothing to answer")


def _answers(line: bytes, prompt: Mapping[str, Any]) -> bool:
    try:
        answer = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(answer, dict):
        return False
    rest = {name: value for name, value in answer.items() if name not in ANSWER_FIELDS}
    return rest == prompt and len(rest) < len(answer)

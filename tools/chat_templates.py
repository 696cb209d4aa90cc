"""Compares chat templates that packages ship with `transformers`: ids, target masks, and what is refused.

    pip download --no-deps -d packages trl axolotl unsloth
    python tools/chat_templates.py packages --report templates.json

Reads `.jinja` files and string constants of Python files in wheels, source archives and folders. Every template renders
every conversation; `transformers` must give the same ids, or this package says why it refuses. A mask is right if it
covers what the assistant says and nothing that others say: each message has a word of its own.
"""

import argparse
import ast
import json
import re
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import ConversationError
from engine.data.chat.find import find_template
from engine.data.chat.template import ChatTemplate
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError

Message = dict[str, Any]
SYMBOL = re.compile(
    r"<[|｜][^<>\n ]{1,60}[|｜]>|</?s>|<(?:bos|eos|pad|unk)>|\[/?[A-Z_]{3,30}\]"
    r"|<(?:start|end)_of_[a-z]+>|</?(?:think|assistant|tool_call|tool_response)>|<\|?[a-z]+(?:[|:][a-z]*)?>|\[\|\w+\|\]"
    r"|<SPECIAL_\d+>|\[e~\["
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "the word"}},
                "required": ["word"],
            },
        },
    }
]


def _say(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _call(word: str, arguments: Any = None) -> Message:
    given = {"word": word} if arguments is None else arguments
    return {
        "type": "function",
        "id": f"call{word}"[:9].ljust(9, "0"),
        "function": {"name": "look_up", "arguments": given},
    }


def conversations() -> dict[str, tuple[list[Message], list[Message] | None]]:
    """Return messages and tools by name. Words that begin with `said` are the assistant's, `told` those of others."""
    ask, answer = _say("user", "told1 How far?"), _say("assistant", "said1 Nine miles.")
    again, last = _say("user", "told2 And back?"), _say("assistant", "said2 Nine more.")
    system = _say("system", "told0 Be brief.")
    thought = {"reasoning_content": "saidT It is nine."}
    calling = _say("assistant", "said1 Let me see.", tool_calls=[_call("mill")])
    result = _say("tool", "told3 A mill.", name="look_up", tool_call_id="callmill0")
    return {
        "one turn": ([ask, answer], None),
        "two turns": ([ask, answer, again, last], None),
        "system": ([system, ask, answer], None),
        "system, two turns": ([system, ask, answer, again, last], None),
        "tools, none called": ([ask, answer], TOOLS),
        "a tool call": ([ask, calling, result, last], TOOLS),
        "system and a tool call": ([system, ask, calling, result, last], TOOLS),
        "two tool calls": (
            [ask, _say("assistant", "", tool_calls=[_call("a"), _call("b")]),
             {**result, "tool_call_id": "calla0000"}, {**result, "content": "told4 B.", "tool_call_id": "callb0000"},
             last],
            TOOLS,
        ),
        "arguments as text": (
            [ask, _say("assistant", "", tool_calls=[_call("mill", '{"word": "mill"}')]), result, last], TOOLS
        ),
        "thoughts": ([ask, {**answer, **thought}], None),
        "thoughts, two turns": ([ask, {**answer, **thought}, again, {**last, "reasoning_content": "saidU A."}], None),
        "thoughts in the content": ([ask, _say("assistant", "<think>\nsaidT Nine.\n</think>\n\nsaid1 Nine.")], None),
        "thoughts under reasoning": ([ask, {**answer, "reasoning": "saidT It is nine."}], None),
        "an empty answer": ([ask, _say("assistant", ""), again, last], None),
        "an empty question": ([_say("user", ""), answer], None),
        "unicode": ([_say("user", "told1 naïve 中文 e\u0301"), _say("assistant", "said1 👩‍👩‍👧 \u200b한국어 ½")], None),
        "whitespace": ([_say("user", " told1\n\n"), _say("assistant", "\n  said1\tx  \n\n")], None),
        "two questions in a row": ([ask, again, answer], None),
        "content in parts": (
            [_say("user", [{"type": "text", "text": "told1 How far?"}]),
             _say("assistant", [{"type": "text", "text": "said1 Nine."}])],
            None,
        ),
        "open end": ([ask, answer, again], None),
    }  # fmt: skip


def templates(paths: list[Path]) -> dict[str, str]:
    """Return the sources of all templates in packages and folders, by their first name; each source once."""
    found: dict[str, str] = {}
    for path in paths:
        for name, content in _files(path):
            text = content.decode(errors="replace")
            sources = [text] if name.endswith((".jinja", ".jinja2")) else _constants(text)
            for i, source in enumerate(sources):
                if "messages" in source and re.search(r"{%-?\s*(for|set|if)", source) and source not in found:
                    found[source] = f"{name}:{i}" if len(sources) > 1 else name
    return {name: source for source, name in found.items()}


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of templates and Python files."""
    wanted = (".jinja", ".jinja2", ".py")
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in (".whl", ".gz"):
                yield from _files(file)
            elif file.is_file() and file.name.endswith(wanted):
                yield str(file.relative_to(path)), file.read_bytes()
    elif path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(wanted):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(wanted) and (opened := archive.extractfile(member)):
                    yield member.name, opened.read()


def _constants(source: str) -> list[str]:
    """Return the strings of a Python file that could be templates."""
    if "{%" not in source:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if "{%" in text and "endfor" in text]


def tokenizer_directory(folder: Path, source: str) -> Path:
    """Write a byte-level tokenizer whose special tokens are those that the template spells out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = sorted({"<s>", "</s>", "<|endoftext|>", *SYMBOL.findall(source)})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([source], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def compare(source: str, folder: Path) -> dict[str, str]:
    """Return the outcome of each conversation with a template."""
    from transformers import AutoTokenizer

    directory = tokenizer_directory(folder, source)
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    encoder = _encoder(ours, source)
    outcomes = {}
    for name, (messages, tools) in conversations().items():
        expected: Any
        try:
            expected = theirs.apply_chat_template(
                [_with_reasoning(message) for message in messages],
                tools=cast(Any, tools), chat_template=source, tokenize=True, return_dict=False,
            )  # fmt: skip
        except Exception as error:  # a template can raise anything
            expected = error
        try:
            if isinstance(encoder, ConfigError):
                raise encoder
            ids, mask = encoder.encode(messages, tools=tools)
            rendered = encoder.template.render(messages, "assistant", tools)
        except (ConfigError, ConversationError) as error:
            reason = re.sub(r"message \d+", "message N", str(error))
            both = isinstance(expected, Exception)
            outcomes[name] = f"refused, as by transformers: {reason}" if both else f"refused: {reason}"
            continue
        if isinstance(expected, Exception):
            outcomes[name] = f"DIFFERENT: transformers fails with {type(expected).__name__}: {expected}"
        elif ids.tolist() != list(expected):
            outcomes[name] = "DIFFERENT: ids"
        else:
            outcomes[name] = _mask_outcome(rendered.text, ours.decode(ids[mask].tolist()))
    return outcomes


def _encoder(tokenizer: Tokenizer, source: str) -> ChatEncoder | ConfigError:
    """Return the encoder of a template, or why it has none."""
    known = find_template(tokenizer, "mistral")
    try:
        return ChatEncoder(tokenizer, ChatTemplate("", source, known.special_tokens_map, known.special))
    except ConfigError as error:
        return error


def _with_reasoning(message: Message) -> Message:
    """Add thoughts under `reasoning`, which transformers fills from no other name."""
    thoughts = message.get("reasoning_content")
    return message if thoughts is None else {**message, "reasoning": thoughts}


def _mask_outcome(text: str, targets: str) -> str:
    said, told = set(re.findall(r"said\w", text)), set(re.findall(r"told\w", targets))
    if told:
        return f"WRONG MASK: {min(told)} is a target"
    if missing := said - set(re.findall(r"said\w", targets)):
        return f"WRONG MASK: {min(missing)} is not a target"
    return "equal"


def main() -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="wheels, source archives, or folders with these")
    parser.add_argument("--report", type=Path, help="write the outcome of every template and conversation as JSON")
    options = parser.parse_args()
    found, report = templates(options.packages), {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, source) in enumerate(found.items()):
            report[name] = compare(source, Path(folder) / str(i))
    outcomes = Counter(outcome for of_template in report.values() for outcome in of_template.values())
    kinds = Counter[str]()
    for outcome, count in outcomes.items():
        kinds[outcome.partition(":")[0]] += count
    print(f"{len(found)} templates, {sum(outcomes.values())} conversations: {dict(kinds.most_common())}")
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome[:200]}")
    if options.report:
        options.report.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""Continue a text with a trained model, talk with it, or let it answer a file of prompts.

DIR is a run directory (its newest checkpoint is taken), a checkpoint, or a Hugging Face directory. What a model writes
goes to stdout as it is written; everything else goes to stderr. Several ranks share the layers: all of them draw the
same tokens, the first one reads and prints.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.huggingface.generation_config import stop_ids
from engine.checkpoint.load import load_decoder
from engine.checkpoint.opening import open_model
from engine.data.chat.template import ChatEncoder, ConversationError, Message, find_template
from engine.data.inspection import printable
from engine.errors import ConfigError, DataError, TriaxisError
from engine.formatting import duration
from engine.generate.decoding import Sampling
from engine.generate.prompts import AnswerFile, conversation, read_prompts
from engine.generate.text_generator import TextGenerator
from engine.parallel.agreement import run_on_all_ranks
from engine.parallel.layout import Layout, World, build_process_groups, init_distributed, shutdown_distributed

WAIT_S = 7 * 24 * 3600  # how long the other ranks wait for what a person says next
SECONDS_BETWEEN_LINES = 2.0
COMMANDS = "an empty line, Ctrl-D, /exit or /quit ends; /reset starts over"
EXAMPLES = """
DIR: a run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory.

examples:
  python tools/generate.py runs/quickstart --prompt 'def main(' --max-new-tokens 64
  git diff | python tools/generate.py DIR --prompt - --temperature 0
  python tools/generate.py DIR --chat                                  # a conversation on the terminal
  python tools/generate.py DIR --chat --system 'Be brief.' --prompt 'What is a mutex?'
  python tools/generate.py DIR --chat --input questions.jsonl --output answers.jsonl --batch-size 16
  torchrun --nproc-per-node 2 tools/generate.py DIR --prompt 'def main('      # layers shared by two ranks

A line of --input is {"prompt": "..."} or, with --chat, {"messages": [{"role": "user", "content": "..."}]}. Its answer
is the same object with completion, num_tokens and stopped ("end of turn" or "length"), or error for a prompt that is
too long. The same command goes on where an interrupted one stopped; ANSWERS.settings.json keeps what the answers were
made with, and other settings are refused. What a prompt gets depends on --seed and on its number in the file, not on
--batch-size.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = _options(arguments)
        prompts = read_prompts(options.input, chat=options.chat) if options.input else []
        world = init_distributed(options.device, timeout_s=WAIT_S)
        try:
            world = build_process_groups(world, Layout(tp=world.layout.world_size))
            options.dir = run_on_all_ranks(world, lambda: _model_directory(options.dir))
            _serve(options, run_on_all_ranks(world, lambda: _load(options, world)), prompts)
        finally:
            shutdown_distributed()
    except TriaxisError as error:
        error.reported_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def _serve(options: argparse.Namespace, speaker: TextGenerator, prompts: list[dict[str, Any]]) -> None:
    if not speaker.world.is_main:
        return speaker.serve_rank()
    try:
        if prompts:
            _answer_file(options, speaker, prompts)
        elif options.prompt is None:
            _converse(options, speaker)
        else:
            _write_once(options, speaker)
    finally:
        speaker.shutdown()


def _write_once(options: argparse.Namespace, speaker: TextGenerator) -> None:
    """One text continued, or one question answered."""
    text = _utf8(sys.stdin.read, "--prompt") if options.prompt == "-" else options.prompt
    started, given = time.perf_counter(), 0
    if options.chat:
        pieces = _answer(speaker, [*_opening(options), {"role": "user", "content": text}])
    else:
        pieces, given = speaker.continue_text(text), len(speaker.text_ids(text))
    count, seconds = len(_print(pieces)) - 1 - given, time.perf_counter() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


def _converse(options: argparse.Namespace, speaker: TextGenerator) -> None:
    """Turn after turn, until there is none."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (gives `input` a history)
        print(COMMANDS, file=sys.stderr)
    messages = _opening(options)
    while (turn := _utf8(_turn, "stdin").strip()) not in ("", "/exit", "/quit"):
        if turn == "/reset":
            messages = _opening(options)
            continue
        if re.match(r"/\w*(\s|$)", turn):  # not a path
            print(f"{turn.split()[0]} is no command: {COMMANDS}", file=sys.stderr)
            continue
        asked = [*messages, {"role": "user", "content": turn}]
        try:
            answer = "".join(_print(_answer(speaker, asked)))
        except ConfigError as error:
            print(f"{error}; /reset starts over", file=sys.stderr)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(speaker: TextGenerator, messages: list[Message]) -> Iterator[str]:
    try:
        return speaker.answer(messages)
    except ConversationError as error:
        raise ConfigError(f"the chat template cannot render this conversation: {error}") from None


def _turn() -> str:
    """What the person says; empty at the end."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    try:
        return input("> ")
    except EOFError:
        return ""


def _opening(options: argparse.Namespace) -> list[Message]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _print(pieces: Iterable[str]) -> list[str]:
    """Print as they come; all of them. On a terminal without what would command it."""
    printed, terminal = [], sys.stdout.isatty()
    for piece in pieces:
        print(printable(piece) if terminal else piece, end="", flush=True)
        printed.append(piece)
    print(flush=True)
    return printed


def _answer_file(options: argparse.Namespace, speaker: TextGenerator, prompts: list[dict[str, Any]]) -> None:
    """Answer the prompts that have no answer yet, a batch at a time."""
    ids = [_prompt_ids(options, speaker, prompt, number) for number, prompt in enumerate(prompts, start=1)]
    with closing(AnswerFile(options.output, prompts, _settings(options, speaker))) as file:
        if file.answered:
            print(
                f"{options.output} has {file.answered} of {len(prompts)} answers; going on from there", file=sys.stderr
            )
        progress = _Progress(file.answered, len(prompts))
        while file.answered < len(prompts):
            numbers = range(len(prompts))[file.answered :][: options.batch_size]
            answers = speaker.answer_batch({number: ids[number] for number in numbers})
            file.write(prompts[number] | answer for number, answer in answers.items())
            progress.add(answers.values())
    print(progress.summary(options.output), file=sys.stderr)


def _settings(options: argparse.Namespace, speaker: TextGenerator) -> dict[str, Any]:
    """What an answer depends on beside its prompt; not what only its last bits do."""
    template = speaker.chat and hashlib.sha256(speaker.chat.template.source.encode()).hexdigest()[:16]
    names = ("temperature", "top_p", "seed", "max_new_tokens", "system", "bos")
    flags = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    return {"model": str(options.dir), "chat template hash": template} | flags


def _prompt_ids(options: argparse.Namespace, speaker: TextGenerator, prompt: dict[str, Any], number: int) -> list[int]:
    if not options.chat:
        return speaker.text_ids(prompt["prompt"])
    try:
        return speaker.message_ids(conversation(prompt, options.system), prompt.get("tools"))
    except ConversationError as error:
        raise DataError(f"{options.input}, prompt {number}: the chat template cannot render it: {error}") from None


class _Progress:
    """A line every few seconds, and one at the end."""

    def __init__(self, done: int, total: int) -> None:
        self._before = self._done = done
        self._total = total
        self._tokens = self._too_long = 0
        self._start = self._shown_at = time.monotonic()

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        for answer in answers:
            self._done += 1
            self._tokens += answer.get("num_tokens", 0)
            self._too_long += "error" in answer
        if time.monotonic() - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            left = (self._shown_at - self._start) / (self._done - self._before) * (self._total - self._done)
            print(f"{self._done}/{self._total} answers, {self._speed()}, ETA {duration(left)}", file=sys.stderr)

    def summary(self, path: Path) -> str:
        count = self._done - self._before - self._too_long
        too_long = f", {self._too_long} too long for the model" if self._too_long else ""
        return f"{path}: {count} prompt{'s' * (count != 1)} answered{too_long}, {self._speed()}"

    def _speed(self) -> str:
        return f"{self._tokens / max(1e-9, time.monotonic() - self._start):.1f} tokens/s"


def _model_directory(path: Path) -> Path:
    """The export or checkpoint itself, where a run has several of them."""
    return open_model(path).path.resolve()


def _load(options: argparse.Namespace, world: World) -> TextGenerator:
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    decoder, tokenizer = load_decoder(options.dir, dtype, world.device, world.tp)
    if options.bos and tokenizer.bos_id is None:
        raise ConfigError(f"--bos: the {tokenizer.kind} tokenizer of {options.dir} has no beginning-of-text token")
    sampling, stop, chat = Sampling(options.temperature, options.top_p, options.seed), stop_ids(tokenizer), None
    if options.chat:
        chat = ChatEncoder(tokenizer, find_template(tokenizer, options.chat_template))
        stop |= {chat.end_of_turn_id}
    return TextGenerator(decoder, tokenizer, world, sampling, options.max_new_tokens, stop, chat, options.bos)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained model, talk with it, or let it answer a file of prompts.",
        epilog=f"{EXAMPLES}\nIn a conversation, {COMMANDS}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="where the model is")
    add("--prompt", metavar="TEXT", help="the text to continue, or what the user says; `-` reads it from stdin")
    add("--input", type=Path, metavar="FILE", help="answer the prompts of a JSONL file")
    add("--output", type=Path, metavar="FILE", help="where the answers go; what is there already is continued")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at once, with --input (default: 8)")
    add("--chat", action="store_true", help="speak with the model's chat template; without --prompt, turn by turn")
    add("--chat-template", metavar="NAME|FILE", help="another one: chatml, llama2, llama3, mistral, or a .jinja file")
    add("--system", metavar="TEXT", help="the system message of a conversation")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    add("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling (default: 0.95)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--bos", action="store_true", help="begin with the beginning-of-text token, for models that want it")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot see."""
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    if (options.input is None) != (options.output is None):
        raise ConfigError("--input and --output belong together: where the prompts are, and where the answers go")
    if options.input and options.prompt is not None:
        raise ConfigError("--prompt and --input are both given; name one of them")
    if options.input and options.output.exists() and options.output.samefile(options.input):
        raise ConfigError(f"--output {options.output} is the file of the prompts; name another one")
    if not (options.chat or options.input or options.prompt is not None):
        raise ConfigError("nothing to write; give --prompt TEXT, --input FILE, or --chat for a conversation")
    if not options.chat and (options.system is not None or options.chat_template):
        raise ConfigError("--system and --chat-template are for conversations; add --chat")
    if options.chat and options.bos:
        raise ConfigError("--bos is for texts; a chat template begins as it wants")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no GPU; use --device cpu, or auto")
    Sampling(options.temperature, options.top_p, options.seed)
    for name in ("prompt", "system"):
        _utf8(partial(getattr, options, name), f"--{name}")


def _utf8(read: Callable[[], str | None], source: str) -> str:
    """The text, if it is one; empty for none."""
    try:
        text = read() or ""
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error}") from None
    return text

"""Generate text with a trained model: complete a prompt, chat, or answer a file of prompts.

Generated text is streamed to stdout, everything else goes to stderr. Multiple ranks run tensor-parallel: all sample the
same tokens, and rank 0 reads the input and prints.
"""

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.huggingface.generation_config import stop_ids
from engine.checkpoint.load import load_decoder
from engine.checkpoint.opening import open_model
from engine.cli.arguments import once_per_node
from engine.cli.generate_options import COMMANDS, generation_parser, parse_options, utf8
from engine.cli.progress import ProgressDisplay
from engine.data.chat.compiled import Message
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import ConversationError
from engine.data.chat.find import find_template
from engine.data.inspection import printable
from engine.errors import ConfigError, DataError, TriaxisError
from engine.formatting import counted
from engine.generate.decoding import Sampling
from engine.generate.prompts import AnswerFile, conversation, read_prompts
from engine.generate.text_generator import TextGenerator
from engine.parallel.agreement import leave_together, run_on_all_ranks
from engine.parallel.layout import Layout, World, build_process_groups, init_distributed

WAIT_S = 7 * 24 * 3600  # timeout of the other ranks for the next input


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    return generation_parser(chat=False)


def main(arguments: Sequence[str] | None = None, *, chat: bool = False) -> None:
    """Run the program; see `--help`. `chat` has the effect of `--chat`."""
    try:
        options = parse_options(arguments, chat=chat)
        prompts = read_prompts(options.input, chat=options.chat) if options.input else []
    except TriaxisError as error:
        once_per_node(error)
        raise
    world = init_distributed(options.device, timeout_s=WAIT_S)
    with leave_together(world, lambda: ""):
        world = build_process_groups(world, Layout(tp=world.layout.world_size))
        options.dir = run_on_all_ranks(world, lambda: _model_directory(options.dir))
        _serve(options, run_on_all_ranks(world, lambda: _load(options, world)), prompts)


def _serve(options: argparse.Namespace, generator: TextGenerator, prompts: list[dict[str, Any]]) -> None:
    if not generator.world.is_main:
        return generator.serve_rank()
    try:
        if prompts:
            _answer_file(options, generator, prompts)
        elif options.prompt is None:
            _converse(options, generator)
        else:
            _write_once(options, generator)
    except TriaxisError:  # raised between two inputs, when the other ranks wait for the next
        generator.shutdown()
        raise
    generator.shutdown()


def _write_once(options: argparse.Namespace, generator: TextGenerator) -> None:
    """Complete one prompt, or answer one message."""
    text = utf8(sys.stdin.read, "--prompt") if options.prompt == "-" else options.prompt
    started, given = time.perf_counter(), 0
    if options.chat:
        pieces = _answer(generator, [*_opening(options), {"role": "user", "content": text}])
    else:
        pieces, given = generator.continue_text(text), len(generator.text_ids(text))
    count, seconds = len(_print(pieces)) - 1 - given, time.perf_counter() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


def _converse(options: argparse.Namespace, generator: TextGenerator) -> None:
    """Chat until the input ends."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (gives `input` a history)
        print(COMMANDS, file=sys.stderr)
    messages = _opening(options)
    while (turn := utf8(_turn, "stdin").strip()) not in ("", "/exit", "/quit"):
        if turn == "/reset":
            messages = _opening(options)
            continue
        if re.match(r"/\w*(\s|$)", turn):  # not a path
            print(f"{turn.split()[0]} is not a command: {COMMANDS}", file=sys.stderr)
            continue
        asked = [*messages, {"role": "user", "content": turn}]
        try:
            answer = "".join(_print(_answer(generator, asked)))
        except ConfigError as error:
            print(f"{error}; /reset starts over", file=sys.stderr)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(generator: TextGenerator, messages: list[Message]) -> Iterator[str]:
    try:
        return generator.answer(messages)
    except ConversationError as error:
        raise ConfigError(f"the chat template cannot render this conversation: {error}") from None


def _turn() -> str:
    """Read the next user turn; empty at the end of the input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    try:
        return input("> ")
    except EOFError:
        return ""


def _opening(options: argparse.Namespace) -> list[Message]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _print(pieces: Iterable[str]) -> list[str]:
    """Print the pieces as they arrive and return them; on a terminal, escape control sequences."""
    printed, terminal = [], sys.stdout.isatty()
    for piece in pieces:
        print(printable(piece) if terminal else piece, end="", flush=True)
        printed.append(piece)
    print(flush=True)
    return printed


def _answer_file(options: argparse.Namespace, generator: TextGenerator, prompts: list[dict[str, Any]]) -> None:
    """Answer the prompts that have no answer yet, in batches."""
    ids = [_prompt_ids(options, generator, prompt, number) for number, prompt in enumerate(prompts, start=1)]
    with closing(AnswerFile(options.output, prompts, _settings(options, generator))) as file:
        if file.answered:
            print(f"{options.output} has {file.answered} of {len(prompts)} answers; resuming", file=sys.stderr)
        with closing(PromptProgress(file.answered, len(prompts))) as progress:
            while file.answered < len(prompts):
                numbers = range(len(prompts))[file.answered :][: options.batch_size]
                answers = generator.answer_batch({number: ids[number] for number in numbers})
                file.write(prompts[number] | answer for number, answer in answers.items())
                progress.add(answers.values())
    print(progress.summary(options.output), file=sys.stderr)


def _settings(options: argparse.Namespace, generator: TextGenerator) -> dict[str, Any]:
    """Settings that affect an answer in addition to its prompt, without those that affect only rounding."""
    template = generator.chat and hashlib.sha256(generator.chat.template.source.encode()).hexdigest()[:16]
    names = ("temperature", "top_p", "seed", "max_new_tokens", "system", "bos")
    flags = {f"--{name.replace('_', '-')}": vars(options)[name] for name in names}
    return {"model": str(options.dir), "chat template hash": template} | flags


def _prompt_ids(
    options: argparse.Namespace, generator: TextGenerator, prompt: dict[str, Any], number: int
) -> list[int]:
    if not options.chat:
        return generator.text_ids(prompt["prompt"])
    try:
        return generator.message_ids(conversation(prompt, options.system), prompt.get("tools"))
    except ConversationError as error:
        raise DataError(f"{options.input}, prompt {number}: the chat template cannot render it: {error}") from None


class PromptProgress(ProgressDisplay):
    """Progress through a file of prompts, with a summary line."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(total, done=done, interval_s=2.0)
        self._num_prompts, self._done, self._new = total, done, 0
        self._tokens = self._too_long = 0

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        for answer in answers:
            self._done += 1
            self._new += 1
            self._tokens += answer.get("num_tokens", 0)
            self._too_long += "error" in answer
        self.update(self._done, f"{self._done}/{self._num_prompts} answers  {self._speed()}")

    def summary(self, path: Path) -> str:
        too_long = f", {self._too_long} too long for the model" if self._too_long else ""
        return f"{path}: {counted(self._new - self._too_long, 'prompt')} answered{too_long}, {self._speed()}"

    def _speed(self) -> str:
        return f"{self._tokens / self.seconds:.1f} tokens/s"


def _model_directory(path: Path) -> Path:
    """Resolve a run directory to its newest checkpoint; a checkpoint or an export is returned as it is."""
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

"""Command-line options of text generation, and their checks."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from engine.cli.arguments import command_name, program_parser, require_at_least
from engine.errors import ConfigError
from engine.generate.decoding import Sampling

COMMANDS = "an empty line, Ctrl-D, /exit or /quit ends; /reset starts over"
DESCRIPTION = "Generate text with a trained model: complete a prompt, chat, or answer a file of prompts."
EXAMPLES = f"""
DIR: a run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory.

examples:
  %(prog)s runs/quickstart --prompt 'def main(' --max-new-tokens 64
  git diff | %(prog)s DIR --prompt - --temperature 0
  %(prog)s DIR --chat                                  # a conversation on the terminal
  %(prog)s DIR --chat --system 'Be brief.' --prompt 'What is a mutex?'
  %(prog)s DIR --chat --input questions.jsonl --output answers.jsonl --batch-size 16
  torchrun --nproc-per-node 2 -m engine generate DIR --prompt 'def main('      # two tensor-parallel ranks

A line of --input is {{"prompt": "..."}} or, with --chat, {{"messages": [{{"role": "user", "content": "..."}}]}}. Its
answer is the same object with completion, num_tokens and stopped ("end of turn" or "length"), or error for a prompt
that is too long. Rerun the same command to resume an interrupted one; ANSWERS.settings.json keeps the settings of the
answers, and other settings are an error. The answer to a prompt depends on --seed and on its number in the file, not
on --batch-size.

In a conversation, {COMMANDS}.
"""
CHAT_DESCRIPTION = "Talk with a trained model on the terminal, or ask it one question or a file of them."
CHAT_EXAMPLES = f"""
DIR: a run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory.

examples:
  %(prog)s models/chat                                 # a conversation on the terminal
  %(prog)s models/chat --system 'Be brief.' --prompt 'What is a mutex?'
  %(prog)s models/chat --input questions.jsonl --output answers.jsonl --batch-size 16

In a conversation, {COMMANDS}.

A line of --input is {{"messages": [{{"role": "user", "content": "..."}}]}}. Its answer is the same object with
completion, num_tokens and stopped ("end of turn" or "length"), or error for a conversation that is too long. Rerun the
same command to resume an interrupted one. `{command_name("generate")}` also completes plain text.
"""


def parse_options(arguments: Sequence[str] | None, *, chat: bool = False) -> argparse.Namespace:
    """Parse and check the command line; `chat` for the command that always chats.

    Raises:
        ConfigError: options conflict or are out of range.
    """
    options = generation_parser(chat=chat).parse_args(arguments)
    _check(options)
    return options


def generation_parser(*, chat: bool) -> argparse.ArgumentParser:
    """Create the parser of `generate`, or of `chat`."""
    if chat:
        parser = program_parser("chat", CHAT_DESCRIPTION, CHAT_EXAMPLES)
        parser.set_defaults(chat=True, bos=False)
    else:
        parser = program_parser("generate", DESCRIPTION, EXAMPLES)
        parser.add_argument(
            "--chat", action="store_true", help="use the model's chat template; without --prompt, an interactive chat"
        )
        parser.add_argument(
            "--bos", action="store_true", help="start with the beginning-of-text token, for models that need it"
        )
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="directory of the model")
    add("--prompt", metavar="TEXT", help="the text to complete, or the user message; `-` reads it from stdin")
    add("--input", type=Path, metavar="FILE", help="answer the prompts of a JSONL file, into --output")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="file for the answers; existing answers are kept and the rest is added",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="prompts per batch, with --input (default: 8)")
    add(
        "--chat-template",
        metavar="NAME|FILE",
        help="another chat template: chatml, llama2, llama3, mistral, or a .jinja file",
    )
    add("--system", metavar="TEXT", help="the system message of a conversation")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="length of an answer at most (default: 128)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    add("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling (default: 0.95)")
    add("--seed", type=int, default=0, help="seed for sampling (default: 0)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto is the GPU, if there is one (default: auto)",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Checks that argparse cannot do."""
    require_at_least(1, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    if (options.input is None) != (options.output is None):
        raise ConfigError("--input (file of prompts) and --output (file for the answers) must be given together")
    if options.input and options.prompt is not None:
        raise ConfigError("--prompt and --input are both given; give one of them")
    if options.input and options.output.exists() and options.output.samefile(options.input):
        raise ConfigError(f"--output {options.output} is the file of prompts; choose another file")
    if not (options.chat or options.input or options.prompt is not None):
        raise ConfigError("nothing to generate; give --prompt TEXT, --input FILE, or --chat for a conversation")
    if not options.chat and (options.system is not None or options.chat_template):
        raise ConfigError("--system and --chat-template apply only to conversations; add --chat")
    if options.chat and options.bos:
        raise ConfigError("--bos does not apply to --chat; a chat template writes its own beginning")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU found on this machine; use --device cpu, or auto")
    Sampling(options.temperature, options.top_p, options.seed)
    for name in ("prompt", "system"):
        utf8(partial(getattr, options, name), f"--{name}")


def utf8(read: Callable[[], str | None], source: str) -> str:
    """Return the text that `read` returns, empty for None.

    Raises:
        ConfigError: the text is not UTF-8; the message names `source`.
    """
    try:
        text = read() or ""
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error}") from None
    return text

"""The command `triaxis`, also `python -m engine`: finds the module of a verb and runs it.

A verb's module is imported only if it is used: torch takes seconds to import, and `config` does not need it.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from engine.cli.arguments import Parser, command_name
from engine.errors import run_program
from engine.formatting import did_you_mean

VERBS = {  # each is a module of engine/cli, with `main` and `parser`: see `verb_module`
    "train": "pretrain or fine-tune, on one process or on all GPUs of one or more nodes",
    "check": "validate a configuration, and print its layout, memory and steps",
    "config": "list recipes and model presets, or print a configuration with all its settings",
    "env": "show the machine, its packages and the implementation of each operator",
    "tokenizer": "train a SentencePiece tokenizer on text",
    "preprocess": "turn text or conversations into a dataset",
    "inspect": "show, count and verify a dataset",
    "from-megatron": "turn a Megatron-LM command line into a configuration",
    "convert": "convert a model from or to a Hugging Face directory",
    "generate": "complete a prompt, or answer a file of prompts",
    "chat": "talk with a model",
    "checkpoints": "list, verify and prune the checkpoints of a run",
    "plan": "check a pipeline schedule and draw its timeline",
    "completion": "print the completion script of a shell",
}
EXAMPLES = """
from text to a model that writes:
  triaxis tokenizer --input corpus.jsonl --vocab-size 4000 --output tokenizer
  triaxis preprocess --input corpus.jsonl --tokenizer-model tokenizer.model --append-eod --output-prefix data/corpus
  triaxis train tiny --ranks 2 --model.vocab_size 4000 --data.tokenizer tokenizer.model \\
      --data.train '[{path: data/corpus_text_document}]'
  triaxis generate runs/tiny --prompt 'Once upon a time'

and for GPUs, in the place of `tiny`:
  triaxis check llama2-7b --gpus 8 --nodes 8
  triaxis train llama2-7b --gpus 8

`triaxis VERB --help` shows the options of a verb, with examples."""


def start() -> NoReturn:
    """Run this program as a process: the entry point of `triaxis` and of `python -m engine`."""
    run_program(main)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run one verb; see `triaxis --help`. Returns the exit code, None for 0."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in VERBS:
        return verb_module(given[0]).main(given[1:])
    if given and given[0] == "--version":
        from engine.cli.version import describe_version

        print(describe_version())
        return None
    parser = _parser()
    if given and not given[0].startswith("-"):
        parser.error(f"no such verb: {given[0]}{did_you_mean(given[0], VERBS)}; verbs: {', '.join(VERBS)}")
    parser.parse_args(given)
    parser.error(f"a verb is missing: {', '.join(VERBS)}")


def verb_module(verb: str) -> Any:
    """Import the module of a verb, which has its `main` and its `parser`."""
    return import_module(f"engine.cli.{verb.replace('-', '_')}")


def _parser() -> Parser:
    """The parser of what is not a verb. Its help lists the verbs."""
    verbs = "\n".join(f"  {verb:15}{summary}" for verb, summary in VERBS.items())
    parser = Parser(
        prog=command_name("").strip(),
        usage="%(prog)s VERB [...]",
        description=f"Pretrain and fine-tune language models of about 7B parameters.\n\nverbs:\n{verbs}",
        epilog=EXAMPLES.strip().replace("triaxis ", command_name("")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="store_true", help="print the version, the commit and what csrc was built with"
    )
    return parser

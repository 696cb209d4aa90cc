"""`triaxis from-megatron`: print the configuration of a Megatron-LM command line."""

import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from engine.cli.arguments import Parser, command_name, program_parser
from engine.cli.megatron.arguments import Arguments
from engine.cli.megatron.notes import Notes
from engine.cli.megatron.translation import translate
from engine.config.load import resolve
from engine.errors import ConfigError
from engine.formatting import counted
from engine.model.families import PRESETS

DESCRIPTION = """Print the configuration that says what the arguments of Megatron-LM say, with comments: what is left to
set, what differs, what has no counterpart, what needs no setting. Arguments that are not given have Megatron-LM's
defaults. If Triaxis cannot run such a model, it says why."""
EXAMPLES = """
examples:
  %(prog)s "--num-layers 32 --hidden-size 4096 ..." > mine.yaml
  %(prog)s -- --num-layers 32 --hidden-size 4096 ... > mine.yaml
  %(prog)s arguments.txt > mine.yaml                         # `-` is stdin
  bash train.sh | %(prog)s - > mine.yaml                     # a script with `echo` put before its torchrun
Everything before the arguments may stay: torchrun with its options, the name of the script."""
_SECTIONS = (
    ("todo", "Set yourself:"),
    ("changed", "Different here:"),
    ("left_out", "No counterpart, left out:"),
    ("implied", "Nothing to set:"),
    ("unknown", "Not known to this command, left out:"),
)


def parser() -> Parser:
    """Create the parser of this command."""
    parser = program_parser("from-megatron", DESCRIPTION, EXAMPLES)
    parser.add_argument("arguments", nargs="+", metavar="ARGS",
                        help="the arguments, a file with them, or - for stdin")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    options, flags = parser().parse_known_args(arguments)
    if flags:
        raise ConfigError(
            f"{flags[0]}: put the arguments of Megatron-LM into quotes, or -- before them: "
            f"{command_name('from-megatron')} -- {flags[0]} ..."
        )
    given = Arguments(_words(options.arguments))
    config, notes = translate(given)
    resolve(config, presets=PRESETS, source="the translation")  # refuses sizes that do not divide
    if notes.unknown:
        count = counted(len(notes.unknown), "argument")
        print(f"warning: {count} not known to this command: {', '.join(notes.unknown)}", file=sys.stderr)
    text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=118)
    print("\n".join([*_comments(notes, given), text]), end="")


def _words(given: Sequence[str]) -> list[str]:
    """The arguments as words: as they are, or those of a text, of a file or of stdin."""
    if len(given) > 1:
        return list(given)
    text = given[0]
    try:
        if text == "-":
            text = sys.stdin.read()
        elif "--" not in text:
            text = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the arguments in {given[0]}: {error}") from None
    words = _split(text)
    if variables := [word for word in words if "$" in word]:
        raise ConfigError(
            f"{variables[0]} is a variable of a shell script; put `echo` before its torchrun, srun or python and give "
            f"what it prints: `bash SCRIPT | {command_name('from-megatron')} -`"
        )
    return words


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigError(f"{text.strip()!r} is not a line of a shell: {error}") from None


def _comments(notes: Notes, given: Arguments) -> list[str]:
    size = f"--gpus {given.gpus or 'N'}" + (f" --nodes {given.nodes}" if given.nodes > 1 else "")
    lines = [
        f"# Translated by `{command_name('from-megatron')}`. Next, with the name of this file:",
        f"#   {command_name('check')} FILE {size}",
        f"#   {command_name('train')} FILE {size}",
    ]
    for name, title in _SECTIONS:
        if items := getattr(notes, name):
            lines.append(f"# {title}")
            lines += [textwrap.fill(item, 118, initial_indent="# - ", subsequent_indent="#   ") for item in items]
    return [*lines, ""]

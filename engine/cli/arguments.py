"""Argument parsing shared by all commands: how the user types a command, its parser, and checks of lower bounds."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import ConfigError, TriaxisError, is_first_of_node
from engine.formatting import did_you_mean

_SCRIPTS = {  # commands that tools/ starts as well
    "tokenizer": "train_tokenizer.py",
    "preprocess": "preprocess_data.py",
    "inspect": "inspect_data.py",
    "convert": "convert_checkpoint.py",
    "generate": "generate.py",
    "chat": "generate.py --chat",
    "plan": "plan.py",
    "prove": "prove.py",
    "parity": "parity.py",
}


def command_name(verb: str) -> str:
    """Return how to start a command in the way in which this program was started.

    That is `triaxis VERB`, `python -m engine VERB` (also from a script of examples/), or `python tools/SCRIPT` for the
    commands that have one.
    """
    program = Path(sys.argv[0])
    if program.parent.name == "tools" and verb in _SCRIPTS:
        return f"python {program.parent / _SCRIPTS[verb]}"
    is_module = program.name == "__main__.py" and program.parent.name == "engine"
    in_clone = is_module or program.parent.name == "tools" or program.suffix == ".sh"
    return f"python -m engine {verb}" if in_clone else f"triaxis {verb}"


def once_per_node(error: TriaxisError) -> TriaxisError:
    """Mark an error that every rank raises before the ranks are connected, so that one rank of a node prints it."""
    error.reported_elsewhere = not is_first_of_node()
    return error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `ConfigError`; among the ranks of a node, one prints the help."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flags = [word.partition("=")[0].replace("_", "-") for word in message.split() if word.startswith("--")]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message += "".join(dict.fromkeys(did_you_mean(flag, known) for flag in flags))
        raise once_per_node(ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help"))

    def print_help(self, file: Any = None) -> None:
        if is_first_of_node():
            super().print_help(file)


def program_parser(verb: str, description: str | None, epilog: str = "") -> Parser:
    """Create the parser of a command, whose help shows the description, the options, and `epilog`, with line breaks
    preserved. `%(prog)s` in the epilog is how the command is started.
    """
    return Parser(
        prog=command_name(verb),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def require_at_least(lowest: int, **options: int | None) -> None:
    """Check lower bounds of options, by their argparse names; None is an option that was not given.

    Raises:
        ConfigError: one of them is below `lowest`.
    """
    for name, value in options.items():
        if value is not None and value < lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {lowest}")

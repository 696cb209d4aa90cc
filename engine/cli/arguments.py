"""Argument parsing shared by all commands: how the user types a command, its parser, and checks of lower bounds."""

import argparse
import sys
from pathlib import Path

from engine.errors import ConfigError

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

    That is `triaxis VERB`, `python -m engine VERB`, or `python tools/SCRIPT` for the commands that have one.
    """
    program = Path(sys.argv[0])
    if program.parent.name == "tools" and verb in _SCRIPTS:
        return f"python {program.parent / _SCRIPTS[verb]}"
    is_module = program.name == "__main__.py" and program.parent.name == "engine"
    return f"python -m engine {verb}" if is_module or program.parent.name == "tools" else f"triaxis {verb}"


def program_parser(verb: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Create the parser of a command, whose help shows the description, the options, and `epilog`, with line breaks
    preserved. `%(prog)s` in the epilog is how the command is started.
    """
    return argparse.ArgumentParser(
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

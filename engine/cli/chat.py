"""`triaxis chat`: talk with a model; the same as `generate --chat`."""

import argparse
from collections.abc import Sequence

from engine.cli import generate
from engine.cli.generate_options import generation_parser


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    return generation_parser(chat=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    generate.main(arguments, chat=True)

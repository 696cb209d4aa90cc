"""Shared by the command lines: a parser made from a docstring, and checks of lower bounds."""

import argparse

from engine.errors import ConfigError


def program_parser(description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help shows a program's docstring, then its options, then `epilog`, with their line breaks."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def require_at_least(lowest: int, **options: int | None) -> None:
    """Check options by name, as argparse stores them; None is an option that was not given.

    Raises:
        ConfigError: one of them is below `lowest`.
    """
    for name, value in options.items():
        if value is not None and value < lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {lowest}")

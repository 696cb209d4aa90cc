"""Argument parsing shared by all commands: parser construction, and checks of lower bounds."""

import argparse

from engine.errors import ConfigError


def program_parser(description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Create a parser whose help shows the description, the options, and `epilog`, with line breaks preserved."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def require_at_least(lowest: int, **options: int | None) -> None:
    """Check lower bounds of options, by their argparse names; None is an option that was not given.

    Raises:
        ConfigError: one of them is below `lowest`.
    """
    for name, value in options.items():
        if value is not None and value < lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {lowest}")

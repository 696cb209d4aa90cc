"""`triaxis completion`: print a completion script for a shell, of all verbs, options, settings, recipes and files."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from engine.cli.arguments import program_parser
from engine.cli.main import VERBS, verb_module
from engine.config.recipes import recipes
from engine.config.schema import Config, Section
from engine.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """
install once (needs the extra `completion`: pip install 'triaxis[completion]'):
  triaxis completion bash > ~/.local/share/bash-completion/completions/triaxis
  triaxis completion zsh > ~/.zfunc/_triaxis           # with fpath+=~/.zfunc before compinit in ~/.zshrc
  triaxis completion fish > ~/.config/fish/completions/triaxis.fish
"""
_WITH_SETTINGS = ("train", "check", "config")


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("completion", "Print the completion script of a shell.", EXAMPLES)
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    shell = parser().parse_args(arguments).shell
    try:
        import shtab
    except ImportError:
        raise ConfigError("shell completion needs shtab: pip install 'triaxis[completion]'") from None
    print(shtab.complete(_whole_parser(), shell, preamble=_recipe_functions()[shell]))


def _whole_parser() -> argparse.ArgumentParser:
    """One parser of everything: each verb's parser, with all settings, and what files and choices belong where."""
    whole = argparse.ArgumentParser(prog="triaxis")
    whole.add_argument("--version", action="store_true", help="print the version and what csrc was built with")
    verbs = whole.add_subparsers()
    for verb, summary in VERBS.items():
        own = parser() if verb == "completion" else verb_module(verb).parser()
        part = verbs.add_parser(verb, help=summary, parents=[own], add_help=False)
        for action in part._actions:
            _complete(action)
        for name, choices, description in _settings(Config) if verb in _WITH_SETTINGS else ():
            part.add_argument(f"--{name}", choices=choices or None, help=(description or "").replace("%", "%%"))
    return whole


def _complete(action: argparse.Action) -> None:
    """Tell shtab what the value of an option is."""
    from shtab import FILE

    config = {"bash": "_triaxis_config", "zsh": "_triaxis_config", "fish": "(_triaxis_config)"}
    if action.dest == "config":
        action.complete = config  # type: ignore[attr-defined]
    elif action.type is Path or action.dest in ("input", "tokenizer_model", "tokenizer", "output_prefix"):
        action.complete = FILE  # type: ignore[attr-defined]


def _recipe_functions() -> dict[str, str]:
    """The function `_triaxis_config` of each shell: names of recipes, and files."""
    names = " ".join(recipes())
    return {
        "bash": f'_triaxis_config() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"_triaxis_config() {{ _alternative 'recipes:recipe:({names})' 'files:file:_files' }}",
        "fish": f"function _triaxis_config; printf '%s\\n' {names}; __fish_complete_path (commandline -ct); end",
    }


def _settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, list[str], str | None]]:
    """Yield the name, the choices and the description of every setting."""
    for key, field in section.model_fields.items():
        name = f"{prefix}{field.alias or key}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _settings(field.annotation, f"{name}.")
        else:
            yield name, [str(choice) for choice in _choices(field.annotation)], field.description


def _choices(annotation: Any) -> list[Any]:
    """The values of a setting that has a fixed set of them; empty for others."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return ["true", "false"] if annotation is bool else []

"""Loads the configuration that a command line names, as `train`, `check` and `config` do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.cli.arguments import Parser, command_name, once_per_node, program_parser
from engine.config.load import load
from engine.config.schema import Config
from engine.errors import CheckpointError, ConfigError
from engine.model.families import PRESETS


def config_parser(verb: str, description: str, examples: str, *, nargs: str | None = None) -> Parser:
    """Create the parser of a command that takes a configuration; use `parse_known_args`, which leaves the overrides."""
    rest = (
        f"CONFIG is a YAML file, or the name of a recipe: `{command_name('config')}` lists them. Any setting can be\n"
        f"overridden behind it: --section.key VALUE, where VALUE is YAML; `{command_name('config')} --schema` has all."
    )
    parser = program_parser(verb, description, f"{rest}\n{examples}")
    parser.allow_abbrev = False
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="a YAML file, or the name of a recipe")
    return parser


def load_config(name: str, overrides: Sequence[str]) -> Config:
    """Load the file or recipe `name` with overrides. Of the ranks of a machine, only the first one reports errors.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        return load(name, overrides, presets=PRESETS, trained=_trained)
    except ConfigError as error:
        once_per_node(error)
        raise


def _trained(kind: str, path: Path) -> tuple[Mapping[str, Any], str | None]:
    from engine.checkpoint.opening import trained  # imports torch
    from engine.checkpoint.run_directory import checkpoints_dir

    if kind == "from_hf" and checkpoints_dir(path).is_dir():
        raise CheckpointError(f"a run of Triaxis, not a Hugging Face directory: --model.from_checkpoint {path}")
    if kind == "from_checkpoint" and not path.exists():
        raise CheckpointError(
            "no such checkpoint directory; name a model by --model.from_checkpoint or --model.from_hf"
        )
    return trained(kind, path)

"""`triaxis config`: list recipes and presets, or print a configuration, a preset, or the schema."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import yaml

from engine.cli.arguments import command_name
from engine.cli.settings import config_parser, load_config
from engine.config.recipes import find_config, recipes
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.model.families import FAMILIES, PRESETS

DESCRIPTION = (
    "List the recipes and the presets of models; with CONFIG, print that configuration with every setting resolved."
)
EXAMPLES = """
examples:
  %(prog)s                                      # recipes and presets
  %(prog)s llama2-7b --parallel.tp 2            # every setting, as a run would use it
  %(prog)s llama2-7b --source > mine.yaml       # the file of a recipe, with its comments, to edit
  %(prog)s --preset qwen3-8b                    # the architecture of a preset
"""


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = config_parser("config", DESCRIPTION, EXAMPLES, nargs="?")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--source", action="store_true", help="print the file as it is, to copy it")
    other.add_argument("--preset", choices=PRESETS, metavar="NAME", help="print the model section of a preset")
    other.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    options, overrides = parser().parse_known_args(arguments)
    if options.config is None:
        if overrides or options.source:
            raise ConfigError(f"CONFIG is missing: a YAML file or a recipe; `{command_name('config')}` lists recipes")
        print(_without_config(options), end="")
    elif options.preset or options.schema:
        raise ConfigError(f"--preset and --schema need no CONFIG; leave out {options.config}")
    elif options.source:
        if overrides:
            raise ConfigError(f"--source prints the file as it is; leave out {' '.join(overrides)}, or --source")
        print(find_config(options.config).read_text(encoding="utf-8"), end="")
    else:
        print(load_config(options.config, overrides).to_yaml(), end="")


def _without_config(options: argparse.Namespace) -> str:
    if options.schema:
        return json.dumps(schema(), indent=2) + "\n"
    if options.preset:
        return yaml.safe_dump({"model": dict(PRESETS[options.preset])}, sort_keys=False)
    return "\n".join([*_list_recipes(), "", *_list_presets()]) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration; the families of models are known here and not in `config`."""
    schema = Config.model_json_schema(by_alias=True)
    schema["$defs"]["ModelConfig"]["properties"]["family"]["enum"] = list(FAMILIES)
    return schema


def _list_recipes() -> list[str]:
    """One line for each recipe: its name and the first sentence of its comment."""
    lines = [f"recipes: CONFIG of `{command_name('train')}`, `{command_name('check')}` and `{command_name('config')}`"]
    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"  {name:17}{first}")
    return lines


def _list_presets() -> list[str]:
    lines = ["presets: sizes of models, for model.preset"]
    for name, fields in PRESETS.items():
        size = f"{fields['num_layers']} layers of {fields['hidden_size']:,}, {fields['num_heads']} heads"
        lines.append(f"  {name:17}{size}, {fields['max_position']:,} positions, {fields['vocab_size']:,} tokens")
    return lines

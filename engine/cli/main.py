"""The `python -m engine` command: train, check, config and env."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.load import load
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.model.families import FAMILIES, PRESETS

EPILOG = (
    "Any setting can be overridden after the file: --section.key VALUE, where VALUE is YAML; "
    "`python -m engine config --schema` lists them all."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; see `python -m engine --help`."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.command == "env":
        if overrides:
            parser.error(f"env takes no arguments, not {' '.join(overrides)}")
        _show_environment()
    elif options.command == "config" and options.schema:
        print(json.dumps(_schema(), indent=2))
    elif options.config is None:
        parser.error("config needs a YAML file, or --schema")
    else:
        _run(options, _load(options.config, overrides))


def _schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration; the families of models are known here and not in `config`."""
    schema = Config.model_json_schema(by_alias=True)
    schema["$defs"]["ModelConfig"]["properties"]["family"]["enum"] = list(FAMILIES)
    return schema


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine",
        description="Pretrain and fine-tune language models; see README.md.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="pretrain or fine-tune: torchrun --nproc-per-node N -m engine train CONFIG"
    )
    check = commands.add_parser("check", help="validate a configuration and show its layout, memory and steps")
    show = commands.add_parser("config", help="print the resolved configuration")
    commands.add_parser("env", help="show the machine, its packages and the implementation of each operator")
    for command in (train, check, show):
        command.epilog, command.allow_abbrev = EPILOG, False
        command.add_argument("config", nargs="?" if command is show else None, help="a YAML file")
    check.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks of the run (default 1)")
    check.add_argument("--gpu-memory-gib", type=float, default=80, metavar="N", help="memory per GPU (default 80)")
    check.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="GPUs per node (default 8)")
    show.add_argument("--schema", action="store_true", help="print the JSON schema instead, for editors")
    return parser


# Commands import their dependencies when they run: torch takes seconds to import, and `config` does not need it.


def _run(options: argparse.Namespace, config: Config) -> None:
    if options.command == "config":
        print(config.to_yaml(), end="")
    elif options.command == "check":
        from engine.cli.check import check_run

        check_run(config, options.world_size, options.gpu_memory_gib, options.ranks_per_node)
    else:
        from engine.train.run import train

        train(config)


def _show_environment() -> None:
    from engine.cli.env import environment

    print("\n".join(environment()))


def _load(path: str, overrides: list[str]) -> Config:
    """Load the configuration; only the first rank on a machine reports errors."""
    try:
        return load(path, overrides, presets=PRESETS, trained=_trained)
    except ConfigError as error:
        error.reported_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def _trained(kind: str, path: Path) -> tuple[Mapping[str, Any], str | None]:
    from engine.checkpoint.opening import trained

    return trained(kind, path)

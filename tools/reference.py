"""Generate the pages and pictures of docs/ that follow from the code.

    python tools/reference.py --write     # write them
    python tools/reference.py --check     # fail if one is out of date

docs/settings.md comes from the schema of the configuration, docs/command-line.md from the parsers of the verbs.
Pictures of schedules are made by the `triaxis plan` commands that pages show with an `--output docs/images/...`; a
picture is up to date if its description, which has the timelines as text, is the one of the command.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from engine.cli import config, plan
from engine.cli.main import VERBS, verb_module
from engine.config.recipes import recipes
from engine.errors import ConfigError, run_program
from engine.model.families import PRESETS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PLAN = re.compile(r"triaxis plan (?P<options>[^`#]*?--output (?P<picture>docs/images/[\w-]+\.png))")
SETTINGS = """# Settings

<!-- written by tools/reference.py -->
Every setting of a run is in one YAML file, and can be overridden on the command line as `--section.key VALUE`, where
the value is YAML. The model's preset or directory takes precedence over defaults, the file over these, and the
command line over all. An unknown key is an error that names a close one, and all problems are reported at once.
`triaxis config CONFIG` prints a file with every setting resolved; `triaxis config --schema` prints the JSON schema, for
editors.
"""
COMMANDS = """# Command line

<!-- written by tools/reference.py -->
One command, `triaxis`, with a verb for each task. `triaxis VERB --help` prints what is below. `python -m engine VERB`
is the same, and so are the programs in `tools/`. When a command fails, its last line says why, and its exit code says
which kind of problem it is: [the codes](communication.md#when-a-rank-fails).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--write", action="store_true", help="write the pages and pictures")
    chosen.add_argument("--check", action="store_true", help="compare them with the code")
    writes = parser.parse_args(arguments).write
    outdated = []
    for page, text in pages().items():
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            outdated.append(page)
            if writes:
                page.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for picture, options in plan_commands().items():
            made = Path(folder, picture.name)
            with redirect_stdout(StringIO()):
                plan.main([*options, "--output", str(made)])
            if not picture.is_file() or description(picture) != description(made):
                outdated.append(picture)
                if writes:
                    picture.write_bytes(made.read_bytes())
    names = ", ".join(str(path.relative_to(ROOT)) for path in outdated)
    if outdated and not writes:
        raise ConfigError(f"out of date: {names}; run python tools/reference.py --write")
    print(f"written: {names}" if outdated else "all is up to date")


def pages() -> dict[Path, str]:
    """The text of each generated page."""
    with _started_as_triaxis():
        return {DOCS / "settings.md": settings(), DOCS / "command-line.md": command_line()}


@contextmanager
def _started_as_triaxis() -> Iterator[None]:
    """Let help texts name commands as `triaxis VERB`, and not in the way in which this program was started."""
    started = sys.argv[0]
    sys.argv[0] = "triaxis"
    try:
        yield
    finally:
        sys.argv[0] = started


def settings() -> str:
    """The page of all settings, a section of the page for each section of the configuration."""
    schema = config.schema()
    return "\n".join([SETTINGS, *_section(schema, "", schema["$defs"]), *_presets()]) + "\n"


def _section(schema: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> Iterator[str]:
    """A line for each setting, then the sections inside, each with a heading."""
    inside = {}
    for key, spec in schema["properties"].items():
        reference = re.search(r"#/\$defs/(\w+)", str(spec))
        if reference:
            inside[key] = definitions[reference[1]]
        if "$ref" not in spec:  # a setting that may be a section, or a list of them, is a setting too
            default = (
                "no default" if "default" not in spec else f"default `{json.dumps(spec['default']).strip(chr(34))}`"
            )
            yield f"- **`{prefix}{key}`** ({kind(spec)}; {default}): {spec['description']}."
    for key, section in inside.items():
        if f"{prefix}{key}" != "data.valid":  # as data.train
            yield f"\n## {prefix}{key}\n\n{' '.join(section['description'].split())}\n"
            yield from _section(section, f"{prefix}{key}.", definitions)


def kind(spec: dict[str, Any]) -> str:
    """What values a JSON schema accepts, in words."""
    if "anyOf" in spec:
        return " or ".join(kind(option) for option in spec["anyOf"])
    if "const" in spec or "enum" in spec:
        *others, last = (f"`{value}`" for value in spec.get("enum", [spec.get("const")]))
        return f"{', '.join(others)} or {last}" if others else last
    if "$ref" in spec:
        return "a section"
    if spec["type"] == "array":
        fixed = spec.get("prefixItems")
        return f"list of {len(fixed)} {kind(fixed[0])}s" if fixed else f"list, each {kind(spec['items'])}"
    known = {"boolean": "`true` or `false`", "string": "text", "null": "`null`"}
    plain = "path" if spec.get("format") == "path" else known.get(spec["type"], spec["type"])
    if spec["type"] == "integer" and spec.get("exclusiveMinimum") == 0:
        spec = spec | {"minimum": 1, "exclusiveMinimum": None}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    bounds = [f"{sign} {spec[key]:,g}" for key, sign in signs.items() if spec.get(key) is not None]
    return f"{plain} {' and '.join(bounds)}".strip()


def _presets() -> Iterator[str]:
    """The sizes of models, and the recipes."""
    yield "\n## Presets\n\nSizes of models, for `model.preset`; a setting of `model` that is given takes precedence.\n"
    yield "| preset | layers | hidden | heads | kv heads | vocabulary | positions |\n|---|---|---|---|---|---|---|"
    for name, size in PRESETS.items():
        columns = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size", "max_position")
        yield f"| `{name}` | {' | '.join(f'{size[column]:,}' for column in columns)} |"
    yield "\n## Recipes\n\nConfigurations that come with Triaxis; `triaxis config NAME --source` prints one.\n"
    for name, path in recipes().items():
        yield f"- `{name}`: {path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}"


def command_line() -> str:
    """The page of all verbs."""
    parts = [COMMANDS]
    parts += [f"- [`{verb}`](#triaxis-{verb}): {summary}" for verb, summary in VERBS.items()]
    for verb in VERBS:
        parser = verb_module(verb).parser()
        parts += [f"\n## triaxis {verb}\n", f"{' '.join((parser.description or '').split())}\n"]
        parts += [option(action) for action in parser._actions if action.dest != "help"]
        if epilog := (parser.epilog or "").replace("%(prog)s", parser.prog).strip("\n"):
            parts.append(f"\n```text\n{epilog}\n```")
    return "\n".join(parts) + "\n"


def option(action: argparse.Action) -> str:
    """One option or argument of a command: how it is written, and its help."""
    values = "|".join(map(str, action.choices or ())) if action.metavar is None else str(action.metavar)
    if action.nargs == 0:
        values = ""
    elif isinstance(action.metavar, tuple):
        values = " ".join(action.metavar)
    elif not values:
        values = action.dest.upper() if action.option_strings else action.dest
    written = " ".join([", ".join(action.option_strings), values]).strip() + (" ..." if action.nargs == "+" else "")
    text = (action.help or "") % {**vars(action), "choices": ", ".join(map(str, action.choices or ()))}
    return f"- `{written}`: {' '.join(text.split())}"


def plan_commands() -> dict[Path, list[str]]:
    """The options of the `triaxis plan` commands in pages that write a picture of docs/, by picture."""
    found: dict[Path, list[str]] = {}
    for page in sorted(DOCS.glob("*.md")):
        for match in PLAN.finditer(page.read_text(encoding="utf-8")):
            options = shlex.split(match["options"].replace("\\\n", " "))
            found[ROOT / match["picture"]] = options[: options.index("--output")]
    return found


def description(picture: Path) -> str:
    """The description that a PNG file carries, empty if it has none."""
    from PIL import Image  # comes with matplotlib

    with Image.open(picture) as image:
        return str(image.info.get("Description", ""))


if __name__ == "__main__":
    run_program(main)

"""The picture of the rooms in ARCHITECTURE.md, drawn from the imports of the code.

    python tools/architecture.py                            # print it
    python tools/architecture.py --write ARCHITECTURE.md    # replace what is between the document's two markers
    python tools/architecture.py --check ARCHITECTURE.md    # fail when the document shows another tree

A room is a package or a module directly in engine/ or in engine/data/. An arrow means "imports", for types alone too. A
room is one floor above the highest one that it imports. The graph (Mermaid, which GitHub renders) omits an arrow if
others lead to the same room, or it would be a web; the table below it lists all of them.
"""

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import ConfigError, run_program

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "engine/data")
BEGIN, END = "<!-- rooms: written by tools/architecture.py -->", "<!-- rooms: end -->"
Imports = dict[str, set[str]]  # room -> the other rooms of its folder that it imports


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="document whose picture is replaced")
    parser.add_argument("--check", type=Path, metavar="FILE", help="document whose picture must be that of the tree")
    args = parser.parse_args(arguments)
    if args.write:
        args.write.write_text(replaced(args.write, picture()), encoding="utf-8")
    if args.check and replaced(args.check, picture()) != args.check.read_text(encoding="utf-8"):
        raise ConfigError(f"{args.check} is out of date; run python tools/architecture.py --write {args.check}")
    if not args.write and not args.check:
        print(picture())


def picture() -> str:
    """A graph and a table for each folder, in Markdown."""
    found = {folder: imports(ROOT / folder, folder.replace("/", ".")) for folder in FOLDERS}
    return "\n\n".join(f"`{folder}/`\n\n{graph(found[folder])}\n\n{table(folder, found[folder])}" for folder in found)


def imports(folder: Path, package: str) -> Imports:
    """What the rooms of `folder`, whose dotted name is `package`, import from each other."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("_"))
    rooms = [path for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()]
    found: Imports = {room.stem: set() for room in rooms}
    for room in rooms:
        for file in [room] if room.is_file() else room.rglob("*.py"):
            inside = {name.removeprefix(f"{package}.") for name in _imported(file) if name.startswith(f"{package}.")}
            found[room.stem] |= {name.split(".")[0] for name in inside} & found.keys() - {room.stem}
    return found


def _imported(file: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{module}{alias.name}" for alias in node.names)


def floors(found: Imports) -> dict[str, int]:
    """The floor of each room, from 0; upper floors first, then by name.

    Raises:
        ConfigError: rooms import each other in a circle.
    """
    floor: dict[str, int] = {}
    while len(floor) < len(found):
        ready = [room for room in found if room not in floor and found[room] <= floor.keys()]
        if not ready:
            raise ConfigError(f"rooms that import each other: {', '.join(sorted(found.keys() - floor.keys()))}")
        floor |= {room: 1 + max((floor[other] for other in found[room]), default=-1) for room in ready}
    return dict(sorted(floor.items(), key=lambda entry: (-entry[1], entry[0])))


def graph(found: Imports) -> str:
    """The rooms as a Mermaid graph, without the arrows that follow from a longer way."""
    below: Imports = {}
    arrows = []
    for room in reversed(floors(found)):
        longer = set().union(*(below[other] for other in found[room]))
        below[room] = found[room] | longer
        arrows += [f"    {room} --> {other}" for other in sorted(found[room] - longer)] or [f"    {room}"]
    return "\n".join(["```mermaid", "flowchart TD", *reversed(arrows), "```"])


def table(folder: str, found: Imports) -> str:
    """Floor, room, the head of its docstring, and everything that it imports."""
    lines = ["| floor | room | what lives there | imports |\n|---|---|---|---|"]
    for room, floor in floors(found).items():
        path = f"{folder}/{room}" if (ROOT / folder / room).is_dir() else f"{folder}/{room}.py"
        others = ", ".join(sorted(found[room])) or "–"
        lines.append(f"| {floor} | [`{room}`]({path}) | {_head(ROOT / path)} | {others} |")
    return "\n".join(lines)


def _head(room: Path) -> str:
    file = room / "__init__.py" if room.is_dir() else room
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ")


def replaced(path: Path, text: str) -> str:
    """The content of a document with `text` between its markers.

    Raises:
        ConfigError: it does not have both markers, once each and in order.
    """
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ConfigError(f"{path}: expected one line {BEGIN} and, below it, one line {END}")
    return f"{content[: content.index(BEGIN)]}{BEGIN}\n\n{text}\n\n{content[content.index(END) :]}"


if __name__ == "__main__":
    run_program(main)

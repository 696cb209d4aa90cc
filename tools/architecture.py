"""Generate the graphs and tables of packages in ARCHITECTURE.md from the imports of the code.

    python tools/architecture.py                            # print it
    python tools/architecture.py --write ARCHITECTURE.md    # replace the text between the document's two markers
    python tools/architecture.py --check ARCHITECTURE.md    # fail if the document is out of date

A "package" is a package or module directly in engine/ or in engine/data/. An arrow means "imports", type-only imports
included. A package is one layer above the highest one that it imports. The graph (Mermaid, which GitHub renders) omits
an arrow if a longer path implies it; the table lists all of them.
"""

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import ConfigError, run_program

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "engine/data")
BEGIN, END = "<!-- packages: written by tools/architecture.py -->", "<!-- packages: end -->"
Imports = dict[str, set[str]]  # package -> the other packages of its folder that it imports


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to update")
    parser.add_argument("--check", type=Path, metavar="FILE", help="document to compare with the tree")
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


def imports(folder: Path, dotted: str) -> Imports:
    """The imports between the packages of `folder`, whose dotted name is `dotted`."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("_"))
    packages = [path for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()]
    found: Imports = {package.stem: set() for package in packages}
    for package in packages:
        for file in [package] if package.is_file() else package.rglob("*.py"):
            inside = {name.removeprefix(f"{dotted}.") for name in _imported(file) if name.startswith(f"{dotted}.")}
            found[package.stem] |= {name.split(".")[0] for name in inside} & found.keys() - {package.stem}
    return found


def _imported(file: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{module}{alias.name}" for alias in node.names)


def layers(found: Imports) -> dict[str, int]:
    """The layer of each package, from 0; sorted by layer, highest first, then by name.

    Raises:
        ConfigError: packages import each other in a circle.
    """
    layer: dict[str, int] = {}
    while len(layer) < len(found):
        ready = [package for package in found if package not in layer and found[package] <= layer.keys()]
        if not ready:
            raise ConfigError(f"packages that import each other: {', '.join(sorted(found.keys() - layer.keys()))}")
        layer |= {package: 1 + max((layer[other] for other in found[package]), default=-1) for package in ready}
    return dict(sorted(layer.items(), key=lambda entry: (-entry[1], entry[0])))


def graph(found: Imports) -> str:
    """The packages as a Mermaid graph, without the arrows that a longer path implies."""
    below: Imports = {}
    arrows = []
    for package in reversed(layers(found)):
        longer = set().union(*(below[other] for other in found[package]))
        below[package] = found[package] | longer
        arrows += [f"    {package} --> {other}" for other in sorted(found[package] - longer)] or [f"    {package}"]
    return "\n".join(["```mermaid", "flowchart TD", *reversed(arrows), "```"])


def table(folder: str, found: Imports) -> str:
    """Layer, package, the first paragraph of its docstring, and all its imports."""
    lines = ["| layer | package | contents | imports |\n|---|---|---|---|"]
    for package, layer in layers(found).items():
        path = f"{folder}/{package}" if (ROOT / folder / package).is_dir() else f"{folder}/{package}.py"
        others = ", ".join(sorted(found[package])) or "–"
        lines.append(f"| {layer} | [`{package}`]({path}) | {_head(ROOT / path)} | {others} |")
    return "\n".join(lines)


def _head(package: Path) -> str:
    file = package / "__init__.py" if package.is_dir() else package
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

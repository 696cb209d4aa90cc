"""Build the documentation site from the repository's pages; a warning or a dead link is an error.

    python tools/docs.py                              # into build/site; needs the extra `docs`
    python tools/docs.py --output DIR --source https://github.com/OWNER/NAME/blob/main --url https://OWNER.github.io/NAME/

The pages are written for GitHub and are the only source. They are copied with three changes: lists get the
indentation that Python-Markdown needs, links to files that are not pages lead to --source (without it they become
text), and Mermaid graphs become SVG, so that the site loads nothing from other hosts. MkDocs with Material builds it,
as `mkdocs.yml` says. Alternative considered: Zensical 0.0.73, Material's successor, builds the same files, but its
strict mode accepts links to missing files and images, and it has no Python 3.10.
"""

import argparse
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import ConfigError, run_program
from tools.architecture import Imports, layers

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "csrc/README.md", "engine/**/README.md", "tools/**/README.md")
ASSETS = ("docs/images/*", "docs/*.css")
SEARCH = {"docs/settings.md": "boost: 10", "CHANGELOG.md": "exclude: true"}  # how the search treats a page
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
COMMENT = re.compile(r"^ *<!--.*?-->\n|<!--.*?-->", re.M | re.S)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]\((?P<target>[^)\s]+)\)")
ITEM = re.compile(r"([-*+]|\d+[.)]) +")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="folder (default: build/site)")
    parser.add_argument("--source", metavar="URL", help="where the repository's files can be read")
    parser.add_argument("--url", default="", help="address of the site")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.source)
        build(Path(folder), options.output.resolve(), options.url)
    problems = list(check(options.output, urlsplit(options.url).path or "/"))
    if problems:
        raise ConfigError("\n".join(problems))
    print(f"written: {options.output / 'index.html'}")


def build(pages: Path, output: Path, url: str) -> None:
    """Run MkDocs on the folder `pages`.

    Raises:
        ConfigError: MkDocs is missing, or warns.
    """
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # a banner of Material's, about MkDocs 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        import material  # noqa: F401
        from mkdocs.commands.build import build as mkdocs_build
        from mkdocs.config import load_config
        from mkdocs.exceptions import Abort
    except ImportError:
        raise ConfigError("the site needs MkDocs and Material: pip install 'triaxis[docs]'") from None
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(output), site_url=url, strict=True)
    try:
        mkdocs_build(config)
    except Abort as error:
        raise ConfigError(f"the site has warnings, see above: {error}") from None


def prepare(folder: Path, source: str | None) -> None:
    """Copy all pages and pictures to `folder`, each at its path in the repository, as MkDocs needs them."""
    pages = [path.relative_to(ROOT) for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    assets = [path.relative_to(ROOT) for pattern in ASSETS for path in sorted(ROOT.glob(pattern))]
    for path in [*pages, *assets]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    for path in assets:
        shutil.copy(ROOT / path, folder / path)
    for page in pages:
        parts = FENCED.split((ROOT / page).read_text(encoding="utf-8"))
        parts[::2] = [linked(part, page, {*pages, *assets}, source) for part in parts[::2]]
        parts[1::2] = [drawn(part) for part in parts[1::2]]
        search = SEARCH.get(page.as_posix(), "boost: 1")
        text = "\n".join(["---", f"search: {{{search}}}", "---", *indented("".join(parts).splitlines()), ""])
        (folder / page).write_text(text, encoding="utf-8")


def linked(text: str, page: Path, copied: set[Path], source: str | None) -> str:
    """The text with its links to files that are not on the site leading to `source`, or being mere text."""

    def target(match: re.Match[str]) -> str:
        path, sharp, anchor = match["target"].partition("#")
        if not path or "://" in path:
            return match[0]
        file = Path(os.path.normpath(page.parent / path))
        if file in copied or match["image"] or not (ROOT / file).exists():  # MkDocs warns of what is missing
            return match[0]
        if file / "README.md" in copied:
            return f"[{match['text']}]({path.rstrip('/')}/README.md{sharp}{anchor})"
        return f"[{match['text']}]({source}/{file.as_posix()}{sharp}{anchor})" if source else match["text"]

    return LINK.sub(target, COMMENT.sub("", text))


def indented(lines: Sequence[str]) -> Iterator[str]:
    """Lines of GitHub's Markdown for Python-Markdown: what is inside a list item is indented by 4 columns per level,
    and a blank line is in front of a list.
    """
    inside: list[int] = []  # column of the text of each list item that is open
    fence, blank = False, True
    for line in lines:
        text = line.lstrip(" ")
        column, within_list = len(line) - len(text), bool(inside)
        item = None if fence else ITEM.match(text)
        if text and not fence and (item or blank or text.startswith(("```", "#"))):
            while inside and column < inside[-1]:
                inside.pop()
            if item and not blank and not within_list:
                yield ""
        fence ^= text.startswith("```")
        yield " " * (column + 4 * len(inside) - (inside[-1] if inside else 0)) + text if text else ""
        if item:
            inside.append(column + item.end())
        blank = not text


def drawn(block: str) -> str:
    """A Mermaid flowchart of `a --> b` lines as SVG, layer by layer; other blocks as they are."""
    if not block.startswith("```mermaid\nflowchart TD\n"):
        return block
    below: Imports = {}
    for line in block.splitlines()[2:-1]:
        package, _, other = line.strip().partition(" --> ")
        below.setdefault(package, set()).update({other} - {""})
        below.setdefault(other or package, set())
    layer = layers(below)
    rows = [[name for name in layer if layer[name] == height] for height in range(max(layer.values()), -1, -1)]
    place = {
        name: (round(640 * (number + 0.5) / len(row)), 30 + 70 * height)
        for height, row in enumerate(rows) for number, name in enumerate(row)
    }  # fmt: skip
    arrows = []
    for (x, y), (u, v) in ((place[name], place[other]) for name, others in below.items() for other in others):
        around = 90 if x == u and v - y > 70 else 0  # an arrow to a lower layer goes around what is between
        arrows.append(f'<path d="M{x},{y + 16}C{x + around},{y + 45} {u + around},{v - 45} {u},{v - 16}"/>')
    boxes = [
        f'<rect x="{x - 55}" y="{y - 16}" width="110" height="32" rx="4"/><text x="{x}" y="{y + 5}">{name}</text>'
        for name, (x, y) in place.items()
    ]
    size = f'viewBox="0 0 640 {70 * len(rows) - 10}" role="img"'
    return f'<div class="graph"><svg {size}>{"".join([*sorted(arrows), *boxes])}</svg></div>'


class _Page(HTMLParser):
    """Ids, links, and what a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found[key] or "" for key in ("id", "name") if key in found}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        elif tag in ("img", "script", "link", "iframe") and found.get("rel") != "canonical":
            self.loads += [found[key] or "" for key in ("src", "href") if found.get(key)]


def check(site: Path, prefix: str = "/") -> Iterator[str]:
    """Yield the problems of a built site: dead links and anchors, things loaded from other hosts, no way back.

    Args:
        prefix: path of the site's address, with which absolute links start.
    """
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    home = (site / "index.html").resolve()
    for file, page in pages.items():
        targets = set()
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads:
                    yield f"{file.relative_to(home.parent)} loads {link}"
                continue
            path = unquote(parts.path)
            start = home.parent / path.removeprefix(prefix) if path.startswith("/") else file.parent / path
            target = (start / "index.html" if start.is_dir() else start).resolve() if path else file
            targets.add(target)
            anchor = unquote(parts.fragment)
            dead = not target.exists() or (anchor and target in pages and anchor not in pages[target].ids)
            if dead and anchor != "__skip":
                yield f"{file.relative_to(home.parent)} has a dead link: {link}"
        if home not in targets:
            yield f"{file.relative_to(home.parent)} has no link to the home page"


if __name__ == "__main__":
    run_program(main)

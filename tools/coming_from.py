"""Generate the tables of docs/coming-from.md from the names in engine/config/foreign.py.

    python tools/coming_from.py --write docs/coming-from.md    # replace the text between the markers of each trainer
    python tools/coming_from.py --check docs/coming-from.md    # fail if the page is out of date

A trainer has two tables: names that have a counterpart, and names that have none. Names with one answer share a row.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config.foreign import TRAINERS, counterpart
from engine.errors import ConfigError, run_program

_MARKED = re.compile(r"(<!-- names of (.+?): written by tools/coming_from.py -->\n).*?(<!-- names: end -->)", re.S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="page to update")
    what.add_argument("--check", type=Path, metavar="FILE", help="page to compare with the names")
    args = parser.parse_args(arguments)
    path: Path = args.write or args.check
    page = path.read_text(encoding="utf-8")
    current = _MARKED.sub(lambda found: f"{found[1]}\n{tables(TRAINERS[found[2]])}\n\n{found[3]}", page)
    if args.write:
        path.write_text(current, encoding="utf-8")
    elif current != page:
        raise ConfigError(f"{path} is out of date; run python tools/coming_from.py --write {path}")


def tables(names: Mapping[str, str]) -> str:
    """The tables of one trainer, in Markdown."""
    by_answer: dict[str, list[str]] = {}
    for name, answer in names.items():
        by_answer.setdefault(answer, []).append(f"`{name}`")
    here, nowhere = ["| theirs | here | |", "|---|---|---|"], ["| theirs | why there is no setting |", "|---|---|"]
    for answer, same in by_answer.items():
        setting, (_, _, note) = counterpart(answer), answer.partition("; ")
        if setting:
            here.append(f"| {', '.join(same)} | `{answer.partition(';')[0]}` | {note} |")
        else:
            nowhere.append(f"| {', '.join(same)} | {answer} |")
    return "\n".join([*here, "", *nowhere])


if __name__ == "__main__":
    run_program(main)

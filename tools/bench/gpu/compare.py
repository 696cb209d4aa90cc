"""What has changed between two runs: figures by name, tests by outcome. A run is a folder of results, or one file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from tools.bench.results import load
from tools.bench.step_profile import parts

SMALL, SMALL_MS = 0.02, 1.0  # smaller changes are noise; parts of a profile change by that many ms at least
LOWER_IS_BETTER = ("s", "ms", "µs", "launches")
Documents = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A measured value."""

    value: float
    unit: str

    @property
    def lower_is_better(self) -> bool:
        return self.unit in LOWER_IS_BETTER


def read(path: Path) -> Documents:
    """Read a run: its documents by stage.

    Raises:
        ConfigError: there are no results.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    documents = {file.stem: load(file) for file in files}
    if not any(document["rows"] or document["machine"] for document in documents.values()):
        raise ConfigError(f"{path}: expected a folder of results, or a file that --json wrote")
    return documents


def rows_of(documents: Documents) -> dict[str, dict[str, Any]]:
    """Return the rows of all stages by name."""
    return {name: row for document in documents.values() for name, row in document["rows"].items()}


def figures(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """Yield all figures by name. A profile has one for each part, with the tokens in its name."""
    for name, row in rows.items():
        if "kernels" in row:
            at = f"{name} of {row['tokens']:,} tokens"
            yield f"{at}, idle", Figure((1 - row["busy"]) * row["wall_us"] / 1e3, "ms")
            yield f"{at}, launches", Figure(sum(launches for _, launches in row["kernels"].values()), "launches")
            yield from ((f"{at}, {part}", Figure(ms, "ms")) for part, (ms, _) in parts(row["kernels"]).items())
        elif "value" in row:
            yield name, Figure(row["value"], row.get("unit", "tokens/s"))
        elif "seconds" in row and "others" in row:
            yield name, Figure(row["seconds"] * 1e6, "µs")


def changes(before: Documents, now: Documents) -> Iterator[str]:
    """Yield lines: each figure that has changed, and whether for the better; then tests with another outcome."""
    cards = [{x["machine"]["gpu"] for x in run.values() if x["machine"].get("gpu")} for run in (before, now)]
    if cards[0] != cards[1]:
        yield f"not the same card: {', '.join(cards[0]) or 'unknown'} -> {', '.join(cards[1]) or 'unknown'}"
    old, new = (dict(figures(rows_of(documents))) for documents in (before, now))
    common = [name for name in new if name in old]
    changed = [name for name in common if _has_changed(old[name], new[name])]
    for name in changed:
        a, b = old[name], new[name]
        mark = "better" if (b.value < a.value) == a.lower_is_better else "WORSE"
        yield f"{mark:6} {b.value / a.value - 1 if a.value else 0:+7.1%}  {name}: {_text(a)} -> {_text(b)} {b.unit}"
    yield f"{len(common) - len(changed)} of {len(common)} figures have changed by less than {SMALL:.0%}"
    if gone := sorted(old.keys() - new.keys()):
        yield f"{len(gone)} figures were not measured now: {'; '.join(gone)}"
    outcomes = [{n: r["outcome"] for n, r in rows_of(d).items() if "outcome" in r} for d in (before, now)]
    for name, outcome in outcomes[1].items():
        if (earlier := outcomes[0].get(name, outcome)) != outcome:
            yield f"{name}: {earlier} -> {outcome}"


def _has_changed(a: Figure, b: Figure) -> bool:
    difference = abs(b.value - a.value)
    return difference > SMALL * a.value and (a.unit != "ms" or difference > SMALL_MS)


def _text(figure: Figure) -> str:
    return f"{figure.value:,.0f}" if figure.value >= 1000 else f"{figure.value:.4g}"

"""Files of results: {"machine": …, "rows": {name: result}}, replaced after every row, so that a killed program leaves
those it had.
"""

import json
import os
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any]:
    """Read a file of results; an empty document if there is none, or if it is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = {}
    document = document if isinstance(document, dict) else {}
    return {**document, "machine": document.get("machine", {}), "rows": document.get("rows", {})}


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a file of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


class Results:
    """The results of a program, in the file that `--json` names, or nowhere."""

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        self._path = path
        self.rows: dict[str, Any] = {}
        self.describe(machine)

    def describe(self, machine: dict[str, Any]) -> None:
        """Set the description of the machine."""
        self.machine = machine
        self._save()

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Add or replace a row."""
        self.rows[name] = result
        self._save()

    def _save(self) -> None:
        if self._path is not None:  # what else is in the file is the harness's, tools/bench/gpu/
            save(self._path, load(self._path) | {"machine": self.machine, "rows": self.rows})

"""Choices by measuring: which of several implementations is the fastest here, measured once and kept on disk.

A choice is kept for what was measured, the device and the versions of its libraries, so that programs on one machine
make the same choice, and with it the same roundings. Alternative considered: measuring at every start; a close choice
would then change from start to start.
"""

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Choice = TypeVar("Choice")

Key = Mapping[str, str | int]
"""What was measured, where, and with which versions."""


@dataclass(frozen=True)
class MeasuredChoices:
    """Measured choices on disk: a JSON file per key, in each of several directories.

    Processes may share the directories: files are replaced atomically. One that is damaged or belongs to another key
    is measured again.

    Attributes:
        directories: read in this order; a choice is written to those that lack it.
        report: gets a line about a file that cannot be used or written.
    """

    directories: Sequence[Path]
    report: Callable[[str], None]

    def choose(
        self, key: Key, measure: Callable[[], Choice], to_json: Callable[[Choice], Any], parse: Callable[[Any], Choice]
    ) -> Choice:
        """Return the choice kept for `key`, else that of `measure`.

        Args:
            to_json, parse: its form in JSON and back; `parse` raises ValueError or TypeError for what is no choice.
        """
        paths = [directory / f"{key['what']}-{digest(key):016x}.json" for directory in self.directories]
        kept = [self._read(path, key, parse) for path in paths]
        found = next((choice for choice in kept if choice is not None), None)
        choice = measure() if found is None else found
        for path, present in zip(paths, kept, strict=True):
            if present is None:
                self._write(path, {"key": dict(key), "choice": to_json(choice)})
        return choice

    def _read(self, path: Path, key: Key, parse: Callable[[Any], Choice]) -> Choice | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != dict(key):
                raise ValueError("it is of another device, or other versions")
            return parse(content["choice"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.report(f"measured    {path} cannot be used, and is replaced: {type(error).__name__}: {error}")
            return None

    def _write(self, path: Path, content: Any) -> None:
        unfinished = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self.report(f"measured    not kept in {path.parent} (ops.measured_dir): {error}")


def default_directory() -> Path | None:
    """Return `$XDG_CACHE_HOME/triaxis`, by default `~/.cache/triaxis` (XDG Base Directory Specification), or None for a
    user without a home.
    """
    roots = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    return next((Path(root) / "triaxis" for root in roots if os.path.isabs(root)), None)


def processor_name() -> str:
    """Return the processor's model as Linux names it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fastest(candidates: Sequence[Choice], seconds: Callable[[Choice], float], *, rounds: int, margin: float) -> Choice:
    """Return the candidate whose smallest of `rounds` times is the smallest; the first, if that is not shorter by
    `margin`, a fraction of its time that may be noise.

    Candidates alternate, so that other load and changing clocks affect all of them.
    """
    times = [[seconds(candidate) for candidate in candidates] for _ in range(rounds)]
    best = [min(of_one) for of_one in zip(*times, strict=True)]
    winner = best.index(min(best))
    return candidates[winner if best[winner] < (1 - margin) * best[0] else 0]


def digest(key: Key) -> int:
    """Return a positive number below 2^63 that stands for `key`."""
    content = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).digest()
    return int.from_bytes(content[:8], "little") >> 1 | 1

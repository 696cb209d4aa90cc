"""Finds input files by name, directory or pattern, and determines their kind by suffix."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.data.preprocess import parquet
from engine.data.preprocess.rejects import REJECTS_SUFFIX
from engine.errors import ConfigError

Kind = Literal["lines", "text", "json", "parquet"]  # json: one array of records, or lines
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Accepted:
    """The accepted kinds of files, by suffix.

    Directories are searched only for the suffixes `in_directories`; other files in them must be named or matched by a
    pattern. Files written by preprocessing are skipped.
    """

    kinds: dict[str, Kind]
    in_directories: tuple[str, ...]


TEXTS = Accepted(
    {
        **{".jsonl": "lines", ".json": "lines", ".parquet": "parquet"},
        **{".txt": "text", ".md": "text", ".rst": "text", ".py": "text"},
    },
    in_directories=(".jsonl", ".txt", ".parquet"),
)
RECORDS = Accepted(
    {".jsonl": "lines", ".json": "json", ".parquet": "parquet"}, in_directories=(".jsonl", ".json", ".parquet")
)


@dataclass(frozen=True)
class Source:
    """An input file. `num_bytes` is its stored size."""

    path: str
    kind: Kind
    num_bytes: int


def find_sources(inputs: Sequence[str], accepted: Accepted = TEXTS) -> list[Source]:
    """Find the files that `inputs` (files, directories and glob patterns) name, in order, sorted within each input.

    Raises:
        ConfigError: a file is missing, of an unknown kind, unreadable, or named twice.
    """
    sources = [_source(path, accepted) for name in inputs for path in _paths(name, accepted)]
    seen: set[str] = set()
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            raise ConfigError(f"input: {source.path} is named twice; its documents would count double")
        seen.add(real)
    return sources


def _paths(name: str, accepted: Accepted) -> list[str]:
    path = Path(name)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if _is_document_file(file, accepted))
        missing = f"no {' or '.join(accepted.in_directories)} files below the directory {name}"
        if others := [suffix for suffix in accepted.kinds if suffix not in accepted.in_directories]:
            missing += f"; a pattern takes {', '.join(others)}, as in '{name}/**/*{others[-1]}'"
    elif path.exists():
        return [name]
    else:
        found = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        missing = f"no such file or directory: {name}"
    if not found:
        raise ConfigError(f"input: {missing}")
    return found


def _is_document_file(path: Path, accepted: Accepted) -> bool:
    """Whether to read a file found in a directory."""
    written = path.name.endswith(REJECTS_SUFFIX) or (path.suffix == ".json" and path.with_suffix(".idx").exists())
    return _plain_suffix(path) in accepted.in_directories and not written and path.is_file()


def _plain_suffix(path: Path) -> str:
    """Return the suffix before a compression suffix."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _source(path: str, accepted: Accepted) -> Source:
    kind = accepted.kinds.get(_plain_suffix(Path(path)))
    if kind is None or (kind == "parquet" and path.endswith(COMPRESSIONS)):
        known = ", ".join(suffix for suffix, kind in accepted.kinds.items() if kind != "parquet")
        raise ConfigError(
            f"input: {path} has an unknown suffix; expected {known}, each also with .gz or .zst, or .parquet"
        )
    if kind == "parquet":
        parquet.require(path)
    if not os.access(path, os.R_OK):
        raise ConfigError(f"input: no permission to read {path}")
    return Source(path, kind, os.path.getsize(path))

"""Finds input files by name, directory or pattern, and determines their kind by suffix."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.data.preprocess import columnar
from engine.data.preprocess.rejects import REJECTS_SUFFIX
from engine.errors import ConfigError
from engine.formatting import counted

Kind = Literal["lines", "text", "json", "csv", "parquet", "arrow"]  # json: one array of records, or lines
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
STDIN = "-"
COLUMNAR = ("parquet", "arrow")  # kinds that are not streams of bytes
WRITTEN = (".json", ".bin", ".idx", ".checksums")
DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `datasets.save_to_disk`


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
        **{".jsonl": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"},
        **{".txt": "text", ".md": "text", ".rst": "text", ".py": "text"},
    },
    in_directories=(".jsonl", ".txt", ".parquet", ".arrow"),
)
RECORDS = Accepted(
    {".jsonl": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"},
    in_directories=(".jsonl", ".json", ".parquet", ".arrow"),
)


@dataclass(frozen=True)
class Source:
    """An input file, or `STDIN`. `num_bytes` is its stored size; 0 for a pipe."""

    path: str
    kind: Kind
    num_bytes: int


def find_sources(
    inputs: Sequence[str], accepted: Accepted = TEXTS, on_unread: Callable[[str], None] = lambda message: None
) -> list[Source]:
    """Find the files that `inputs` (files, directories and glob patterns) name, in order, sorted within each input.

    Args:
        inputs: `STDIN` is standard input, as JSONL.
        on_unread: called for each directory of which some files are not read, with their number by suffix.

    Raises:
        ConfigError: a file is missing, of an unknown kind, unreadable, or named twice.
    """
    sources = [_source(path, accepted) for name in inputs for path in _paths(name, accepted, on_unread)]
    seen: set[str] = set()
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            raise ConfigError(f"input: {source.path} is named twice; its documents would count double")
        seen.add(real)
    return sources


def _paths(name: str, accepted: Accepted, on_unread: Callable[[str], None]) -> list[str]:
    path = Path(name)
    if name == STDIN:
        return [name]
    if path.is_dir():
        found = _search(path, accepted, on_unread)
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


def _search(directory: Path, accepted: Accepted, on_unread: Callable[[str], None]) -> list[str]:
    """Return the files to read below a directory, and report the others."""
    files = sorted(str(file) for file in directory.rglob("*") if file.is_file())
    read = {file: None for file in files if _is_document_file(Path(file), directory, accepted)}
    unread = Counter(_kind_of_unread(Path(file), directory) for file in files if file not in read)
    del unread[""]
    if unread and read:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in unread.most_common(5)) + ", …" * (len(unread) > 5)
        on_unread(
            f"{directory}: {counted(unread.total(), 'file')} of {len(files):,} not read ({kinds}); of a directory, "
            f"{', '.join(accepted.in_directories)} are read; name others, or give a pattern"
        )
    return list(read)


def _is_document_file(path: Path, directory: Path, accepted: Accepted) -> bool:
    """Whether to read a file found in a directory."""
    return _plain_suffix(path) in accepted.in_directories and not _is_hidden(path, directory) and not _is_written(path)


def _kind_of_unread(path: Path, directory: Path) -> str:
    """Return a word for a file that is not read; empty if preprocessing has written it."""
    if _is_hidden(path, directory):
        return "hidden"
    return "" if _is_written(path) else _plain_suffix(path) or "without a suffix"


def _is_hidden(path: Path, directory: Path) -> bool:
    """Whether a file is in a hidden directory, as the copies in .ipynb_checkpoints, or hidden itself."""
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def _is_written(path: Path) -> bool:
    """Whether preprocessing, or `datasets` beside its data, has written a file."""
    beside_index = path.suffix in WRITTEN and Path(f"{path}".removesuffix(path.suffix) + ".idx").exists()
    description = path.name in DESCRIPTIONS and path.with_name(DESCRIPTIONS[0]).exists()
    return path.name.endswith(REJECTS_SUFFIX) or beside_index or description


def _plain_suffix(path: Path) -> str:
    """Return the suffix before a compression suffix."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _source(path: str, accepted: Accepted) -> Source:
    if path == STDIN:
        return Source(path, "lines", 0)
    kind = accepted.kinds.get(_plain_suffix(Path(path)))
    if kind is None or (kind in COLUMNAR and path.endswith(COMPRESSIONS)):
        known = ", ".join(suffix for suffix, kind in accepted.kinds.items() if kind not in COLUMNAR)
        columns = " or ".join(suffix for suffix, kind in accepted.kinds.items() if kind in COLUMNAR)
        raise ConfigError(
            f"input: {path} has an unknown suffix; expected {known}, each also with {', '.join(COMPRESSIONS[:-1])} or "
            f"{COMPRESSIONS[-1]}, or {columns}"
        )
    if kind in COLUMNAR:
        columnar.require(path)
    if not os.access(path, os.R_OK):
        raise ConfigError(f"input: no permission to read {path}")
    status = os.stat(path)
    return Source(path, kind, status.st_size if stat.S_ISREG(status.st_mode) else 0)

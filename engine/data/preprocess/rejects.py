"""Rejected lines and the file that stores them."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import orjson

REJECTS_SUFFIX = ".rejects.jsonl"


@dataclass(frozen=True)
class Reject:
    """A rejected line, or the first unreadable line of a file.

    Attributes:
        reason: why it was rejected.
        text: the beginning of the line.
    """

    file: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class RejectFile:
    """Writes rejected lines to `PREFIX.rejects.jsonl`, which exists only if any line was rejected.

    A context manager; after an exception no file is left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> "RejectFile":
        return self

    def add(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            self._file = self._file or self._partial.open("wb")
            self._file.write(orjson.dumps(reject, option=orjson.OPT_APPEND_NEWLINE))

    def sync(self) -> None:
        """Flush to disk everything that can fail for lack of space; only the rename remains."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk was reported earlier
            if self._file is not None:
                self._file.close()
        if kind is not None:
            with suppress(OSError):  # the prefix is below a file, which the original error reports
                self._partial.unlink(missing_ok=True)
        elif self._file is not None:
            self._partial.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)


def rejects_path(output_prefix: str) -> Path:
    """Return the path of the rejected lines of a dataset, PREFIX.rejects.jsonl."""
    return Path(output_prefix + REJECTS_SUFFIX)

"""Rejected lines and the file that stores them."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import orjson

from engine.data.storage.output import OutputOwner
from engine.data.storage.writer import storage_errors

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

    A context manager; after an exception no file is left. Only one may write to a path at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner = OutputOwner(path.with_name(f"{path.name}.lock"), [path])
        self._partial = self._owner.partial(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> "RejectFile":
        """Take the path.

        Raises:
            ConfigError: another process writes to it.
        """
        with storage_errors(self.path):
            self._owner.acquire()
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
        if kind is None and self._file is not None:
            self._partial.replace(self.path)
        elif kind is None:
            self.path.unlink(missing_ok=True)
        self._owner.release()


def rejects_path(output_prefix: str) -> Path:
    """Return the path of the rejected lines of a dataset, PREFIX.rejects.jsonl."""
    return Path(output_prefix + REJECTS_SUFFIX)

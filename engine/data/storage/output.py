"""Output files with one owner, written under temporary names.

Two programs that write to one prefix would corrupt each other's files: each would rename what the other has half
written. So the owner holds a lock, and the temporary names of every owner differ. Alternative considered: a lock file
whose existence is the lock; it would stay after a kill.
"""

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from engine.errors import ConfigError

PARTIAL_SUFFIX = ".partial"


class OutputOwner:
    """The exclusive right to write the files `paths`, held from `acquire` to `release`.

    Acquiring removes the temporary files that a killed owner has left.

    Args:
        lock: the lock file, which exists while the lock is held.
        paths: the files to be written.
    """

    def __init__(self, lock: Path, paths: Sequence[Path]) -> None:
        self._lock, self._paths = lock, paths
        self._file: BinaryIO | None = None
        self._name = secrets.token_hex(4)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process holds it.
            OSError: the directory cannot be written.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = self._lock.open("ab+", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(file):
                    self._file = file
            except BlockingIOError:
                raise ConfigError(_owned(self._lock, file)) from None
            finally:
                if self._file is None:
                    file.close()
        os.register_at_fork(after_in_child=file.close)  # or a worker would hold the lock of a killed parent
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        for path in self._paths:
            self._remove_leftovers(path)

    def release(self) -> None:
        """Remove this owner's temporary files and give up the lock; also after a failed `acquire`."""
        if self._file is None:
            return
        for path in self._paths:
            with suppress(OSError):
                self.partial(path).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.unlink()
        self._file.close()
        self._file = None

    def partial(self, path: Path) -> Path:
        """Return the temporary name of one of the files."""
        return path.with_name(f"{path.name}.{self._name}{PARTIAL_SUFFIX}")

    def _is_current(self, file: BinaryIO) -> bool:
        """Whether the locked file is still the one at the path; the owner before removes it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._lock))
        except FileNotFoundError:
            return False

    def _remove_leftovers(self, path: Path) -> None:
        pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
        for name in os.listdir(path.parent):
            if pattern.fullmatch(name):
                (path.parent / name).unlink(missing_ok=True)


def _owned(lock: Path, file: BinaryIO) -> str:
    file.seek(0)
    owner = ascii(file.read(200).decode(errors="replace")).strip("'") or "another process"
    prefix = lock.with_suffix("")
    return f"{owner} is writing {prefix}; wait until it ends, or choose another output prefix"

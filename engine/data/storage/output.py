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
        self._descriptor: int | None = None
        self._name = secrets.token_hex(4)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process holds it.
            OSError: the directory cannot be written.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(descriptor):
                    self._descriptor = descriptor
            except BlockingIOError:
                raise ConfigError(_owned(self._lock, descriptor)) from None
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        for path in self._paths:
            self._remove_leftovers(path)

    def release(self) -> None:
        """Remove this owner's temporary files and give up the lock; also after a failed `acquire`."""
        if self._descriptor is None:
            return
        for path in self._paths:
            with suppress(OSError):
                self.partial(path).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.unlink()
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing would not unlock while forked workers have it open
        os.close(self._descriptor)
        self._descriptor = None

    def partial(self, path: Path) -> Path:
        """Return the temporary name of one of the files."""
        return path.with_name(f"{path.name}.{self._name}{PARTIAL_SUFFIX}")

    def _is_current(self, descriptor: int) -> bool:
        """Whether the locked file is still the one at the path; the owner before removes it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._lock))
        except FileNotFoundError:
            return False

    def _remove_leftovers(self, path: Path) -> None:
        pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
        for name in os.listdir(path.parent):
            if pattern.fullmatch(name):
                (path.parent / name).unlink(missing_ok=True)


def _owned(lock: Path, descriptor: int) -> str:
    owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
    prefix = lock.with_suffix("")
    return f"{owner} is writing {prefix}; wait until it ends, or choose another output prefix"

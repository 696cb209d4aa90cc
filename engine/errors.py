"""The engine's exceptions and their exit codes.

An error message contains the actual value, the expected one, and the setting to change. Exit codes follow BSD's
sysexits if one applies, so that schedulers and scripts can distinguish "restart" from "fix the configuration".
"""

import errno
import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class TriaxisError(Exception):
    """Base class of errors that end a program with a message instead of a traceback.

    `reported_elsewhere` is set if another rank prints the same error.
    """

    exit_code = 1
    advice = "read the message above"
    reported_elsewhere = False


class ConfigError(TriaxisError):
    """The configuration is invalid."""

    exit_code = 64
    advice = "fix the configuration and start again"


class DataError(TriaxisError):
    """The data do not fit the run: wrong tokenizer, too few tokens, nothing left to train on."""

    exit_code = 65
    advice = "fix the data or the data settings and start again"


class DataFormatError(DataError):
    """A dataset file is damaged or not of the expected format."""


class CheckpointError(TriaxisError):
    """No usable checkpoint, or one that belongs to another model."""

    exit_code = 66
    advice = "name a usable checkpoint, or choose an empty run.dir"


class PeerError(TriaxisError):
    """Another rank, or the network on the way to it, does not answer."""

    exit_code = 69
    advice = "check the hosts of these ranks and the network between them, then rerun the same command to resume"


class NonFiniteError(TriaxisError):
    """Loss or gradients were NaN or infinite for too many steps."""

    exit_code = 71
    advice = "resume from an earlier checkpoint with a lower optimizer.lr"


class OutOfMemoryError(TriaxisError):
    """The run does not fit into the memory of this machine."""

    exit_code = 72
    advice = "use a smaller model or more devices"


class StorageError(TriaxisError):
    """Reading or writing failed: disk full, I/O error, no permission."""

    exit_code = 74
    advice = "free or repair the storage and start again"


class Interrupted(TriaxisError):
    """Stopped by a signal, after a checkpoint was saved."""

    exit_code = 75
    advice = "rerun the same command to resume"


_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}
_TORCH_OUT_OF_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: can't allocate memory")


def as_triaxis_error(error: BaseException) -> TriaxisError | None:
    """Convert an error to a `TriaxisError`; None if it needs a traceback."""
    if isinstance(error, TriaxisError):
        return error
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return StorageError(str(error))
    description = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(sign in description for sign in _TORCH_OUT_OF_MEMORY):
        return OutOfMemoryError(description)
    return None


def error_of(exit_code: int, message: str) -> TriaxisError:
    """Create an error of the class with `exit_code`, to raise another rank's failure on this one."""
    kinds = (kind for kind in TriaxisError.__subclasses__() if kind.exit_code == exit_code)
    return next(kinds, TriaxisError)(message)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and exit with its exit code.

    A `TriaxisError` is printed to stderr as a message whose last line gives the exit code and advice; other errors keep
    their traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        code = _report(error)
    gc.collect()  # a traceback holds process groups, which must not be destroyed during interpreter shutdown
    sys.exit(code)


def end_process(error: TriaxisError) -> NoReturn:
    """Report `error` and end this process at once with its exit code, whatever its other threads are blocked in."""
    sys.stdout.flush()
    if not error.reported_elsewhere:
        _print(error)
    os._exit(error.exit_code)


def _report(error: Exception) -> int:
    """Print the error, unless another rank does; return the exit code."""
    known = as_triaxis_error(error)
    if known is None:
        raise error
    if not known.reported_elsewhere:
        sys.stdout.flush()
        _print(known)
    return known.exit_code


def _print(error: TriaxisError) -> None:
    print(f"error: {error}\nexit {error.exit_code}: {error.advice}", file=sys.stderr, flush=True)

"""The engine's exceptions and their exit codes.

An error message contains the actual value, the expected one, and the setting to change. Exit codes follow BSD's
sysexits if one applies, so that schedulers and scripts can distinguish "restart" from "fix the configuration".
"""

import errno
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


class TriaxisError(Exception):
    """Base class of errors that end a program with a message instead of a traceback.

    `reported_elsewhere` is set if another rank prints the same error, `is_shared` if all ranks raise it together.
    `patience_s` is how long this rank leaves the report to the other one. torchrun looks at its ranks ten times a
    second, shows the first one that failed and ends the rest: a silent rank that ended first would end the one that
    reports. The time is used up only where the other rank is on another node.
    """

    exit_code = 1
    advice = "read the message above"
    reported_elsewhere = False
    is_shared = False
    patience_s = 5.0


class ConfigError(TriaxisError):
    """The configuration is invalid."""

    exit_code = 64
    advice = "correct the command or the configuration and start again"


class DataError(TriaxisError):
    """The data do not fit the run: wrong tokenizer, too few tokens, nothing left to train on."""

    exit_code = 65
    advice = "fix the data or the data settings and start again"


class DataFormatError(DataError):
    """A dataset file is damaged or not of the expected format."""


class CheckpointError(TriaxisError):
    """No usable checkpoint, or one that belongs to another model."""

    exit_code = 66
    advice = "name a usable checkpoint or model, or choose an empty directory for the run"


class PeerError(TriaxisError):
    """Another rank, or the network on the way to it, does not answer.

    The other one may have failed and then reports it, so this rank waits as well.
    """

    exit_code = 69
    advice = "check the hosts of these ranks and the network between them, then rerun the same command to resume"


class HangError(TriaxisError):
    """A rank makes no progress; see `engine/train/guard.py`."""

    exit_code = 70
    advice = (
        "rerun the same command to resume; the stacks of all ranks say where they were. If they were only slow, raise "
        "parallel.hang_s, or set it to null"
    )


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
    patience_s = 0.0  # torchrun has ended all ranks already, or their scheduler has
    advice = "rerun the same command to resume"


_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}
_TORCH_OUT_OF_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: can't allocate memory")
_LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "Socket closed"),  # gloo, when the peer's process ends
    *("Connection was likely closed", "Broken pipe"),  # the store of torch.distributed
    *("ncclRemoteError", "remote process exited"),
)


def as_triaxis_error(error: BaseException) -> TriaxisError | None:
    """Convert an error to a `TriaxisError`; None if it needs a traceback."""
    if isinstance(error, TriaxisError):
        return error
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return StorageError(str(error))
    description = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(sign in description for sign in _TORCH_OUT_OF_MEMORY):
        return OutOfMemoryError(description)
    first_line = str(error).partition("\n")[0]  # a later one may be of a traceback, of any connection
    if isinstance(error, RuntimeError) and any(sign in first_line for sign in _LOST_CONNECTION):
        return PeerError("lost the connection to another rank, whose own message says why")
    return None


def ended_by(what: str, number: int) -> TriaxisError:
    """Create the error of a process that the signal `number` has ended, so that it could not report anything."""
    name = signal.Signals(number).name
    hint = "; often the machine has run out of memory" if name == "SIGKILL" else ""
    return TriaxisError(f"{what} was ended by {name}{hint}")


def is_first_of_node() -> bool:
    """Whether this process is the first rank of its node, or no rank of torchrun."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def error_of(exit_code: int, message: str) -> TriaxisError:
    """Create an error of the class with `exit_code`, to raise another rank's failure on this one."""
    kinds = (kind for kind in TriaxisError.__subclasses__() if kind.exit_code == exit_code)
    return next(kinds, TriaxisError)(message)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and exit with its exit code.

    A `TriaxisError` is printed to stderr as a message whose last line gives the exit code and advice; other errors keep
    their traceback. Notes of the error say where it happened.
    """
    failure: BaseException | None = None
    try:
        code = main() or 0
        if sys.stdout:  # None if it was closed before the start
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        failure, code = error, _report(error)
    if failure is not None and _is_connected():
        _exit_without_peers(code)
    failure = None
    gc.collect()  # a traceback holds process groups, which must not be destroyed during interpreter shutdown
    sys.exit(code)


def end_process(error: TriaxisError) -> NoReturn:
    """Report `error` and end this process at once with its exit code, whatever its other threads are blocked in."""
    _print(error, ())
    _exit_without_peers(error.exit_code)


def _report(error: BaseException) -> int:
    """Print the error, unless another rank does; return the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, KeyboardInterrupt):
        if is_first_of_node():
            _print_on_stderr("interrupted")
        return 130
    known = as_triaxis_error(error)
    if known is None:
        _print_on_stderr("", end="")
        sys.excepthook(type(error), error, error.__traceback__)
        _tell_torchrun("".join(traceback.format_exception_only(error)).strip(), printed=True)
        return 1
    if known.reported_elsewhere or (isinstance(known, PeerError) and not known.is_shared):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends this rank
        time.sleep(known.patience_s * (2 if known.reported_elsewhere else 1))
    _print(known, getattr(error, "__notes__", ()))
    return known.exit_code


def report_rank(error: TriaxisError, stderr: int, *, code: int, silent: bool = False) -> None:
    """Report an error of a rank from another process, which ends it with `code`; 0: a signal has ended it.

    Args:
        stderr: the file descriptor of the rank's.
        silent: leave the report to torchrun.
    """
    text = f"error: {error}" + (f"\nexit {code}: {error.advice}" if code else "")
    _tell_torchrun(text, printed=not silent, code=code)
    if not silent:
        with suppress(OSError):
            os.write(stderr, f"{text}\n".encode())


def _print(error: TriaxisError, notes: Iterable[str]) -> None:
    where = "".join(f"{note}: " for note in notes if note)
    text = f"error: {where}{error}\nexit {error.exit_code}: {error.advice}"
    if not error.reported_elsewhere:
        _print_on_stderr(text)
    if not (error.reported_elsewhere and isinstance(error, PeerError)):  # of which only the other rank knows the cause
        _tell_torchrun(text, printed=not error.reported_elsewhere)


def _print_on_stderr(text: str, end: str = "\n") -> None:
    """Print after what is on stdout, on a line from which the bar of a rank that has ended is erased."""
    if sys.stdout:
        sys.stdout.flush()
    if sys.stderr:
        on_screen = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        print("\x1b[K" * on_screen + text, end=end, file=sys.stderr, flush=True)


def _tell_torchrun(text: str, *, printed: bool, **more: Any) -> None:
    """Write the error to the file that torchrun names, in the format of `torch.distributed.elastic`.

    Bare torchrun ends with a report of its own, and shows `py_callstack` of the first failure at its end. `triaxis
    train` shows the text if no rank of the node has: the one that reports may be ended before it does.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": f"\n{text}", "timestamp": str(int(time.time()))}
        content = {"message": {"message": text, "extraInfo": extra}, "text": text, "printed": printed} | more
        with suppress(OSError):
            Path(file).write_text(json.dumps(content), encoding="utf-8")


def _is_connected() -> bool:
    """Whether this process belongs to a group of ranks; torch is imported only by programs that use it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _exit_without_peers(code: int) -> NoReturn:
    """End the process at once, leaving the process groups as they are.

    The peers wait for this rank in communication that will never happen, and so does this rank's part of it: NCCL's
    shutdown, the destructors of the process groups and the CUDA runtime wait for kernels that have no partner.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)

import errno

import pytest

from engine.errors import (
    ConfigError,
    OutOfMemoryError,
    StorageError,
    TriaxisError,
    as_triaxis_error,
    error_of,
    run_program,
)


def fail(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 64),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 74),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 74),
        (MemoryError(), 72),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 72),
    ],
)
def test_the_process_ends_with_the_code_and_says_what_to_do(error, code, capsys):
    with pytest.raises(SystemExit) as end:
        run_program(fail(error))
    assert end.value.code == code
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert last.startswith(f"exit {code}: ")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(fail(ZeroDivisionError()))


def test_an_error_reported_elsewhere_is_silent(capsys):
    error = ConfigError("no")
    error.reported_elsewhere = True
    with pytest.raises(SystemExit) as end:
        run_program(fail(error))
    assert end.value.code == 64
    assert capsys.readouterr().err == ""


def test_codes_and_classes_belong_together():
    codes = [kind.exit_code for kind in TriaxisError.__subclasses__()]
    assert {64, 65, 66, 71, 72, 74, 75} <= set(codes)
    assert isinstance(error_of(72, "x"), OutOfMemoryError)
    assert isinstance(as_triaxis_error(OSError(errno.EIO, "x")), StorageError)
    assert as_triaxis_error(OSError(errno.ENOTDIR, "x")) is None

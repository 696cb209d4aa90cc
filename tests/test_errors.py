import errno
import signal
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from engine.errors import (
    ConfigError,
    OutOfMemoryError,
    PeerError,
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


def test_a_fault_of_the_program_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # PyTorch puts its own before it
    error = ZeroDivisionError("none")
    error.add_note("rank 3 (host), step 12")
    with pytest.raises(SystemExit) as end:
        run_program(fail(error))
    assert end.value.code == 1
    first, *_, fault, where = capsys.readouterr().err.splitlines()
    assert (first, fault) == ("Traceback (most recent call last):", "ZeroDivisionError: none")
    assert where == "rank 3 (host), step 12"


def test_a_message_says_where_it_happened(capsys):
    error = ConfigError("no")
    error.add_note("rank 3 (host), step 12")
    with pytest.raises(SystemExit):
        run_program(fail(error))
    assert capsys.readouterr().err.startswith("error: rank 3 (host), step 12: no\n")


@pytest.mark.parametrize(
    "text",  # of gloo, of the store, of NCCL
    [
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10464. This is typically caused by a "
        "remote worker crashing. Check the logs of the remote worker before reporting an error.",
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:189: Connection reset by peer.",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "Broken pipe",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL 2.27",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_a_lost_connection_is_no_fault_of_this_rank(text):
    assert isinstance(as_triaxis_error(RuntimeError(text)), PeerError)
    assert as_triaxis_error(ValueError(text)) is None


def test_errors_of_files_and_of_communication_that_differ_stay_themselves():
    for error in (
        BrokenPipeError(errno.EPIPE, "Broken pipe"),  # of a closed stdout
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),  # of a tracker
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
        RuntimeError("reading (0, 1) failed:\nConnectionResetError: [Errno 104] Connection reset by peer"),  # of data
    ):
        assert as_triaxis_error(error) is None


def test_an_error_reported_elsewhere_is_silent_and_ends_after_the_report(capsys, monkeypatch):
    """torchrun would end the rank that reports it as soon as this one has ended."""
    handlers, waits = [], []
    monkeypatch.setattr(signal, "signal", lambda *given: handlers.append(given))
    monkeypatch.setattr(time, "sleep", waits.append)
    error = ConfigError("no")
    error.reported_elsewhere = True
    with pytest.raises(SystemExit) as end:
        run_program(fail(error))
    assert end.value.code == 64
    assert capsys.readouterr().err == ""
    assert (handlers, waits) == ([(signal.SIGTERM, signal.SIG_DFL)], [10.0])
    with pytest.raises(SystemExit):
        run_program(fail(ConfigError("no")))
    assert waits == [10.0]  # the rank that reports does not wait


@pytest.mark.parametrize(
    ("error", "elsewhere", "text"),
    [
        (ConfigError("no"), False, "error: no\nexit 64: correct the command or the configuration and start again"),
        (ConfigError("no"), True, "error: no\nexit 64: correct the command or the configuration and start again"),
        (ZeroDivisionError("none"), False, "ZeroDivisionError: none"),
        (PeerError("gone"), True, None),
    ],
)
def test_torchrun_reports_the_error_of_a_rank(error, elsewhere, text, tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    error.reported_elsewhere, error.patience_s = elsewhere, 0
    with pytest.raises(SystemExit) as end:
        run_program(fail(error))
    assert file.exists() == (text is not None)
    if text is None:  # only the other rank knows the cause
        return
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=end.value.code, error_file=str(file))
    shown = str(ChildFailedError("train", {0: failure})).splitlines()
    number = len(text.splitlines())
    assert [line.removeprefix("  ") for line in shown[-1 - number : -1]] == text.splitlines()
    assert failure.error_file_data["printed"] != elsewhere
    assert time.time() - failure.timestamp < 60


def test_codes_classes_and_the_table_belong_together():
    codes = [kind.exit_code for kind in TriaxisError.__subclasses__()]
    assert {64, 65, 66, 69, 71, 72, 74, 75} <= set(codes)
    page = (Path(__file__).parents[1] / "docs/communication.md").read_text()
    assert all(f"\n| {code} | " in page for code in codes)
    assert isinstance(error_of(72, "x"), OutOfMemoryError)
    assert isinstance(as_triaxis_error(OSError(errno.EIO, "x")), StorageError)
    assert as_triaxis_error(OSError(errno.ENOTDIR, "x")) is None

"""What a rank leaves behind when it hangs or dies: the stacks of its threads, and its last calls to other ranks.

Both are written to files, because a rank whose main thread waits for the device cannot answer. The stacks come from
Python's fault handler, which needs no lock of the interpreter. The calls come from PyTorch's flight recorder, which a
second thread reads on a signal.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import torch

_CALLS = 8  # the last ones to show
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # the second one only in builds with NCCL
_GRACE_S = 2.0  # for the second thread to write, which it cannot while the first one holds the interpreter's lock
RECORDER_SETTINGS = {"TORCH_FR_BUFFER_SIZE": "200"}
"""Environment variables with which the flight recorder keeps the last calls; set before the first process group."""


def leave_traces(directory: Path, rank: int) -> None:
    """Arrange for this process to write its last calls on SIGUSR2, and its stacks if it is aborted or crashes."""
    # the fault handler keeps the file open
    faulthandler.enable((directory / f"{rank}.stacks").open("w", encoding="utf-8"))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # in all threads, so that one can wait for it
    threading.Thread(target=_write_calls_on_signal, args=[directory / f"{rank}.calls"], daemon=True).start()


def end_with_traces(directory: Path, pids: Mapping[int, int]) -> None:
    """End processes that have called `leave_traces` and may hang, given by rank; what they leave is then written."""
    _signal(pids.values(), signal.SIGUSR2)
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until and not all((directory / f"{rank}.calls").exists() for rank in pids):
        time.sleep(0.02)
    _signal(pids.values(), signal.SIGABRT)


def read_traces(directory: Path, rank: int) -> str:
    """Return what `rank` has left, or an empty string."""
    found = []
    for kind in ("stacks", "calls"):
        path = directory / f"{rank}.{kind}"
        if path.exists() and (text := path.read_text(encoding="utf-8", errors="replace").strip()):
            found.append(f"{kind} of rank {rank}:\n{text}")
    return "\n".join(found)


def recorded_calls() -> list[str]:
    """Describe this process's last calls to other ranks; see `last_calls`."""
    c10d: Any = torch._C._distributed_c10d
    dumps = [getattr(c10d, name)() for name in _DUMPS if hasattr(c10d, name)]
    return list(dict.fromkeys(line for dump in dumps for line in last_calls(dump)))


def last_calls(dump: bytes, count: int = _CALLS) -> list[str]:
    """Describe the last entries of a dump of the flight recorder (JSON), oldest first, one line each."""
    entries = orjson.loads(dump).get("entries", [])
    return [_described(entry) for entry in entries[-count:]]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _described(entry: dict[str, Any]) -> str:
    kind = "p2p" if entry.get("is_p2p") else "collective"
    number, group = entry.get(f"{kind}_seq_id"), "/".join(entry.get("process_group", []))
    sizes = f"{entry.get('input_sizes')} -> {entry.get('output_sizes')}"
    return f"{entry.get('profiling_name')} {kind} {number} of group {group}: {sizes}, {entry.get('state')}"


def _write_calls_on_signal(path: Path) -> None:
    signal.sigwait([signal.SIGUSR2])
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("\n".join(recorded_calls()), encoding="utf-8")
    unfinished.rename(path)

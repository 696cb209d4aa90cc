"""Commands as people type them."""

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from engine.errors import run_program

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{_BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=180, check=False
    )


def python(*arguments: object) -> subprocess.CompletedProcess:
    """Of the repository's root."""
    return start([sys.executable, *map(str, arguments)], ROOT)


def forked(program: Callable[[], object], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """What `run_program(program)` prints and ends with in a fork of this process, which has imported torch already."""
    files = [cwd / "stdout.txt", cwd / "stderr.txt"]
    gc.collect()
    if (pid := os.fork()) == 0:
        gc.freeze()  # `run_program` then leaves the garbage of other tests, whose threads are not in this process
        try:
            os.chdir(cwd)
            os.environ.update(environment)
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            run_program(program)  # type: ignore[arg-type]
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return subprocess.CompletedProcess([], code, *(file.read_text() for file in files))

"""Commands as people type them."""

import os
import subprocess
import sys
from pathlib import Path

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

"""What is installed: the version, the commit, and what csrc was built with.

Light to import, as setup.py uses it as well.
"""

import subprocess
from pathlib import Path

import engine

_PACKAGE = Path(engine.__file__).resolve().parent
COMMIT_FILE = "COMMIT"  # in the package; written by setup.py into wheels and source distributions


def commit() -> str:
    """Return the commit of this package: as recorded when it was built, or of the checkout; else `unknown`."""
    recorded = _PACKAGE / COMMIT_FILE
    if recorded.exists():
        return recorded.read_text(encoding="ascii").strip()
    if not (_PACKAGE.parent / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def csrc_build() -> str:
    """Return what csrc was built with, or why it is not used."""
    import ctypes

    from engine.ops import native  # imports torch, which takes a second

    if native.WHY_NOT:
        return f"{native.WHY_NOT}; plain PyTorch paths"
    build = ctypes.CDLL(str(native.LIBRARY)).triaxis_build
    build.restype = ctypes.c_char_p
    return build().decode()


def describe_version() -> str:
    """Return the text of `triaxis --version`."""
    import torch

    return f"triaxis {engine.__version__} ({commit()})\ntorch   {torch.__version__}\ncsrc    {csrc_build()}"

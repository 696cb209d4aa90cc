"""The compiled library engine/_csrc.so on a machine: copied from a bundle, or built there."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from csrc.build import find_nvcc

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / "engine" / "_csrc.so"
SOURCES = (".cu", ".cuh", ".cpp", ".h")


def csrc_hash() -> str:
    """Hash the sources of the library, so that one is not taken for another's."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in SOURCES:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def provide(bundle: Path | None, bundled_hash: str | None) -> str:
    """Put the library there and say where it came from: the bundle, this machine's nvcc, or it was there before."""
    if bundle is not None and (bundle / LIBRARY.name).exists() and bundled_hash == csrc_hash():
        shutil.copy2(bundle / LIBRARY.name, LIBRARY)
        return f"copied from {bundle}"
    outdated = " (the bundle's is of other sources)" if bundled_hash not in (None, csrc_hash()) else ""
    if find_nvcc() is not None:
        build()
        return f"built here{outdated}"
    return f"there before, and no nvcc{outdated}" if LIBRARY.exists() else f"missing, and no nvcc{outdated}"


def build() -> None:
    """Build the library with its kernels.

    Raises:
        subprocess.CalledProcessError: a compiler failed; its messages have been printed.
    """
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "TRIAXIS_CUDA": "on"}, check=True)

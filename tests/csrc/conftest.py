"""Emulated kernels: built once, and loaded for CPU tensors."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from csrc.build import Toolchain, build_emulated, find_nvcc
from engine.ops import native

BUILD = Path(__file__).parents[2] / "build" / "csrc"


@pytest.fixture(scope="session")
def toolchain():
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs the CUDA toolkit: nvcc and its headers")
    return Toolchain(os.environ.get("CXX", "g++"), Path(torch.__file__).parent, nvcc)


@pytest.fixture(scope="session")
def emulated_library(toolchain):
    """Path of a library with the kernels for CPU tensors."""
    assert not native.WHY_NOT, native.WHY_NOT
    BUILD.mkdir(parents=True, exist_ok=True)
    library = Path(os.environ.get("TRIAXIS_TEST_EMULATED", BUILD / "emulated.so"))
    if "TRIAXIS_TEST_EMULATED" not in os.environ:
        with FileLock(BUILD / "emulated.lock"):
            build_emulated(toolchain, BUILD, library)
    return library


@pytest.fixture(scope="session")
def emulated(emulated_library):
    """Kernels for CPU tensors in `torch.ops.triaxis`; call it with a seed for the order in which warps run."""
    with FileLock(BUILD / "emulated.lock"):
        torch.ops.load_library(emulated_library)
    seed = ctypes.CDLL(str(emulated_library)).triaxis_emulation_seed
    seed.argtypes = [ctypes.c_uint64]
    seed(0)
    return seed


@pytest.fixture
def launched(emulated, emulated_library):
    """Call it for the number of kernels that were launched in the emulation so far."""
    count = ctypes.CDLL(str(emulated_library)).triaxis_emulation_launches
    count.restype = ctypes.c_uint64
    return count


@pytest.fixture
def broken(toolchain, tmp_path):
    """Runs a test on kernels with one line changed: returns the exit code of pytest, and its output."""

    def run(file: str, old: str, new: str, test: str) -> tuple[int, str]:
        root = tmp_path / "csrc"
        shutil.copytree(Path(__file__).parents[2] / "csrc", root)
        source = root / file
        text = source.read_text(encoding="utf-8")
        assert old in text
        source.write_text(text.replace(old, new, 1), encoding="utf-8")
        library = tmp_path / "broken.so"
        build_emulated(toolchain, BUILD, library, root)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
            env={**os.environ, "TRIAXIS_TEST_EMULATED": str(library)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout

    return run

"""The kernels on a GPU. Without one, or without compiled kernels, every file here is skipped with that reason.

The tests of tests/csrc are imported and run again: their tensors then come to be on the GPU, because the fixture that
would load the emulated kernels makes it the default device.
"""

from pathlib import Path

import pytest
import torch

import tests
from engine.ops import native

DEVICE = "cuda"
if (here := str(Path(__file__).parents[1])) not in tests.__path__:  # an installed package calls itself so
    tests.__path__.append(here)


def why_not() -> str:
    """Empty, or why nothing here can run."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    return "" if native.has_kernels() else f"needs compiled kernels: {native.WHY_NOT or 'csrc was built without CUDA'}"


class _Skipped(pytest.Module):
    def collect(self):
        pytest.skip(why_not())


def pytest_pycollect_makemodule(module_path, parent):
    return _Skipped.from_parent(parent, path=module_path) if why_not() else None


@pytest.fixture
def emulated():
    """Stands for the fixture of tests/csrc: tensors are made on the GPU, and the order of warps is its own."""
    with torch.device(DEVICE):
        yield lambda seed: None


@pytest.fixture
def kernels(emulated, monkeypatch):
    """Call it to have the engine take the kernels; before, it takes its plain paths."""
    rule = native.runs
    monkeypatch.setattr(native, "runs", lambda x: False)
    return lambda: monkeypatch.setattr(native, "runs", rule)

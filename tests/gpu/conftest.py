"""The kernels on a GPU. Without one, or without compiled kernels, every file here is skipped with the reason.

Tests of tests/csrc are imported and run again, on the GPU: the fixture that would load the emulated kernels makes it
the default device.
"""

from pathlib import Path

import pytest
import torch

import tests
from engine.ops import native

DEVICE = "cuda"
if (here := str(Path(__file__).parents[1])) not in tests.__path__:  # an installed package may have this name
    tests.__path__.append(here)


def why_not() -> str:
    """Why the tests cannot run, or an empty string."""
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
    """Replaces the fixture of tests/csrc: tensors are created on the GPU, and the seed of warps is ignored."""
    with torch.device(DEVICE):
        yield lambda seed: None


@pytest.fixture
def kernels(emulated, monkeypatch):
    """Call it to enable the kernels; until then the engine runs on plain PyTorch."""
    rule = native.runs
    monkeypatch.setattr(native, "runs", lambda x: False)
    return lambda: monkeypatch.setattr(native, "runs", rule)

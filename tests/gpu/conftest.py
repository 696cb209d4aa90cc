"""The kernels on a GPU. Without one, or without compiled kernels, every file here is skipped with the reason.

Tests of tests/csrc are imported and run again, on the GPU: the fixture that would load the emulated kernels makes it
the default device.

Each file runs in a process of its own, and in a new one behind a test that leaves the GPU unusable, for example by an
illegal instruction: that test fails, and no other for its sake.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tests
from engine.ops import native
from engine.testing.isolated_tests import IsolatedTests, give_up_process, is_isolated

DEVICE = "cuda"
if (here := str(Path(__file__).parents[1])) not in tests.__path__:  # an installed package may have this name
    tests.__path__.append(here)


def why_not() -> str:
    """Why the tests cannot run, or an empty string."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    return "" if native.has_kernels() else f"needs compiled kernels: {native.WHY_NOT or 'csrc was built without CUDA'}"


_isolated = IsolatedTests()


def pytest_runtest_protocol(item, nextitem):
    if item.path.parent != Path(__file__).parent or is_isolated(item.config):
        return None
    _isolated.run(item)
    return True


def pytest_sessionfinish():
    _isolated.close()


@contextmanager
def _usable_gpu(config: pytest.Config) -> Iterator[None]:
    """Waits for what the test has started, so that its errors are this test's."""
    try:
        yield
    finally:
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except RuntimeError as error:
            give_up_process(config)
            raise RuntimeError(f"the GPU is unusable behind this test: {str(error).splitlines()[0]}") from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with _usable_gpu(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with _usable_gpu(item.config):
        return (yield)


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

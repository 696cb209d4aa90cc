"""Tests in processes of their own: what a test does to its process costs that test alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
import pytest
from engine.testing.isolated_tests import IsolatedTests, give_up_process, is_isolated
tests = IsolatedTests()

def pytest_runtest_protocol(item, nextitem):
    if is_isolated(item.config):
        return None
    tests.run(item)
    return True

def pytest_sessionfinish():
    tests.close()

@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    result = yield
    import torch
    if getattr(torch, "ruined", False):
        give_up_process(item.config)
        raise RuntimeError("this test left an unusable process")
    return result
"""
FILE = """
import os, pytest, torch

@pytest.fixture(scope="module")
def shared():
    print("SHARED IS MADE")
    return os.getpid()

def test_first(shared):
    assert shared == os.getpid() != PARENT
    print("process", os.getpid())

@pytest.mark.parametrize("value", [1, 2, "a::b c"])
def test_values(value, shared):
    print("process", os.getpid())
    assert value != 2, "two is wrong"

def test_skipped():
    pytest.skip("not today")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False

BROKEN

def test_last(shared):
    print("process", os.getpid())
    assert shared == os.getpid()
"""


def run(tmp_path, *arguments: str, conftest: str = CONFTEST, **files: str) -> tuple[dict[str, int], str]:
    """The counts of the summary, and the output."""
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n", encoding="utf-8")
    for name, text in files.items():
        text = text.replace("PARENT", 'int(os.environ["PARENT"])')
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    program = "import os, sys, pytest; os.environ['PARENT'] = str(os.getpid()); sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "-rA", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stdout.splitlines()[-1]
    return {what: int(count) for count, what in re.findall(r"(\d+) ([a-z]+)", last)}, done.stdout


def processes(output: str) -> list[str]:
    return re.findall(r"^process (\d+)$", output, flags=re.M)


def test_outcomes_are_those_of_one_process(tmp_path):
    counts, output = run(tmp_path, test_a=FILE.replace("BROKEN", ""), test_b=FILE.replace("BROKEN", ""))
    assert {**counts, "in": 0} == {"passed": 8, "failed": 2, "skipped": 2, "xfailed": 2, "in": 0}
    assert output.count("AssertionError: two is wrong") >= 2
    assert "not today" in output
    assert len(set(processes(output))) == 2  # a process a file
    assert output.count("SHARED IS MADE") == 2


@pytest.mark.parametrize(
    "body, message",
    [
        ("os.abort()", "the process of this test ended with signal 6"),
        ("os.write(2, b'the last words'); os._exit(7)", "the process of this test ended with exit code 7"),
        ("torch.ruined = True", "this test left an unusable process"),
        ("torch.ruined = True; assert False", "this test left an unusable process"),
    ],
)
def test_what_ruins_a_process_costs_one_test(tmp_path, body, message):
    broken = f"def test_broken():\n    {body}\n\ndef test_behind():\n    pass\n"
    counts, output = run(tmp_path, test_a=FILE.replace("BROKEN", broken))
    assert counts["passed"] == (6 if body == "torch.ruined = True" else 5)  # the call passes, its end is an error
    assert counts.get("failed", 0) + counts.get("error", 0) == (3 if "assert" in body else 2)
    assert re.search(rf"_ (ERROR at teardown of )?test_broken _.*{message}", output, flags=re.S)
    assert message in output
    assert len(set(processes(output))) == 2  # the rest of the file has a new one
    assert "PASSED test_a.py::test_last" in output
    if "words" in body:
        assert "the last words" in output


def test_a_file_that_cannot_be_imported_in_its_process(tmp_path):
    """Every test is an error with what the process printed; the program ends."""
    text = "import os\nif os.getpid() != PARENT:\n    os.write(2, b'no import')\n    os._exit(9)\n"
    counts, output = run(tmp_path, test_a=text + "def test_one():\n    pass\n\ndef test_two():\n    pass\n")
    assert counts["errors"] == 2
    assert output.count("ended with exit code 9") >= 2
    assert "no import" in output


def test_only_what_is_asked_for_runs(tmp_path):
    counts, output = run(tmp_path, "-k", "first or a::b", test_a=FILE.replace("BROKEN", ""))
    assert counts["passed"] == 2
    assert len(processes(output)) == 2
    counts, _ = run(tmp_path, "-x", test_a=FILE.replace("BROKEN", "def test_long():\n    import time; time.sleep(60)"))
    assert (counts["passed"], counts["failed"]) == (2, 1)


SITE = """
import torch
from engine.ops import native

def synchronize():
    if getattr(torch.cuda, "broken", False):
        raise RuntimeError("CUDA error: an illegal instruction was encountered\\nand more")

torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
native.has_kernels = lambda: True
"""
GPU_FILE = """
import torch

def test_good():
    torch.cuda.synchronize()

def test_fault_that_shows_later():
    torch.cuda.broken = True

def test_fault():
    torch.cuda.broken = True
    torch.cuda.synchronize()

def test_behind():
    torch.cuda.synchronize()
"""


def test_a_gpu_that_is_unusable_costs_one_test(tmp_path):
    """The conftest.py of tests/gpu, with a host that stands for the GPU."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    conftest = (ROOT / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8")
    counts, output = run(tmp_path, conftest=conftest, test_kernels=GPU_FILE)
    assert counts["passed"] == counts["failed"] == 2
    named = "the GPU is unusable behind this test: CUDA error: an illegal instruction was encountered"
    assert "FAILED test_kernels.py::test_fault_that_shows_later - " in output
    assert "FAILED test_kernels.py::test_fault - " in output
    assert output.count(f"RuntimeError: {named}\n") == 2

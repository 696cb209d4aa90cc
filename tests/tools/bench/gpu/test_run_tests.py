"""Outcomes of tests are kept as they come, whatever ends the process."""

import os
import subprocess
import sys

from tools.bench.gpu.stages import ROOT
from tools.bench.results import load

TESTS = """
import os
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "a reason"

@pytest.fixture
def broken():
    yield
    raise RuntimeError("in the end")

def test_fails_in_the_end(broken):
    pass

def test_is_skipped():
    pytest.skip("needs more")

def test_ends_the_process():
    if "ENDS" in os.environ:
        os._exit(9)

def test_last():
    pass
"""


def run(tmp_path, *options: str, **environment: str) -> tuple[int, dict[str, str], dict]:
    path, results = tmp_path / "test_some.py", tmp_path / "a.json"
    path.write_text(TESTS)
    command = [sys.executable, "tools/bench/gpu/run_tests.py", "--json", str(results), *options, str(path)]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, env={**os.environ, **environment})
    rows = {name.partition("::")[2]: row for name, row in load(results)["rows"].items()}
    return done.returncode, {name: row["outcome"] for name, row in rows.items()}, rows


def test_outcomes(tmp_path):
    code, outcomes, rows = run(tmp_path)
    assert code == 1
    assert outcomes == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_fails_in_the_end": "failed",
        "test_is_skipped": "skipped",
        "test_ends_the_process": "passed",
        "test_last": "passed",
    }
    assert "a reason" in rows["test_fails"]["error"]
    assert "in the end" in rows["test_fails_in_the_end"]["error"]


def test_what_a_dying_process_had_and_had_not_run(tmp_path):
    code, outcomes, _ = run(tmp_path, ENDS="1")
    assert code == 9
    assert outcomes["test_fails"] == "failed"
    assert [name for name, outcome in outcomes.items() if outcome == "not run"] == [
        "test_ends_the_process",
        "test_last",
    ]


def test_parts_are_disjoint_and_complete(tmp_path):
    parts = [list(run(tmp_path, "--part", f"{part}/4")[1]) for part in (1, 2, 3, 4)]
    assert [name for part in parts for name in part] == list(run(tmp_path)[1])
    assert all(parts)

"""Run tests of tests/gpu and keep every outcome as it comes: {test: {"outcome", "seconds"}}, "not run" until then.

    python tools/bench/gpu/run_tests.py --json tests-norm.json tests/gpu/test_norm.py -k forward
    python tools/bench/gpu/run_tests.py --json ranks.json --part 1/4 tests/gpu/test_ranks.py

What follows the known options goes to pytest. Tests run in processes of their own (tests/gpu/conftest.py).
"""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench.kernel_table import source
from tools.bench.results import Results

NOT_RUN = "not run"


class Outcomes:
    """A plugin of pytest that selects one of `num_parts` parts of the tests, and writes the outcome of each."""

    def __init__(self, results: Results, part: int, num_parts: int) -> None:
        self._results, self._part, self._num_parts = results, part, num_parts

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        first, end = (len(items) * part // self._num_parts for part in (self._part - 1, self._part))
        items[:] = items[first:end]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._results.rows[item.nodeid] = {"outcome": NOT_RUN}
        self._results.describe(self._results.machine)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self._results.rows.get(report.nodeid, {})
        seconds = row.get("seconds", 0.0) + report.duration
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            self._results.add(report.nodeid, {"outcome": "failed", "seconds": seconds, "error": "\n".join(text[-12:])})
        elif row.get("outcome") != "failed" and (report.when == "call" or report.skipped):
            self._results.add(report.nodeid, {"outcome": report.outcome, "seconds": seconds})


def main() -> int:
    """Run the program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="write the outcomes there")
    parser.add_argument("--commit", help="commit that is tested, if git is not available")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="run the tests of part I of N (default: 1/1)")
    options, arguments = parser.parse_known_args()
    part, num_parts = map(int, options.part.split("/"))
    outcomes = Outcomes(Results(options.json, source(options.commit)), part, num_parts)
    given = ["-q", "-rs", "-p", "no:cacheprovider", *arguments]
    return int(pytest.main(given, plugins=[outcomes]))


if __name__ == "__main__":
    sys.exit(main())

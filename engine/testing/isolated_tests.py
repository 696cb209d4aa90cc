"""A pytest plugin: each file of tests runs in a process of its own, and in a new one behind a test that ruined it.

An illegal instruction on a GPU makes every later call of the process fail, and a fault on the host ends it. Here either
costs the test that caused it, which is named; the others of the file run in a new process.

A `conftest.py` hands its tests over from its `pytest_runtest_protocol` (`IsolatedTests.run`), unless the process is
already one of these (`is_isolated`). Its processes run pytest on one file, with this module as a plugin, and write each
report to a file that the first process reads. Alternatives considered: pytest-forked (a process that uses CUDA cannot
be forked), and pytest-xdist (blames the next test if a process is given up behind one).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest

POLL_S = 0.005
MAX_OUTPUT = 4000  # characters of a process's output in the report of its end
_STARTED, _FINISHED, _REPORT = "started", "finished", "report"


class IsolatedTests:
    """Runs tests in processes of their own, one at a time."""

    def __init__(self) -> None:
        self._process: _Process | None = None

    def run(self, item: pytest.Item) -> None:
        """Run a test and report its outcome to this process's pytest; for `pytest_runtest_protocol`."""
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def close(self) -> None:
        """End the process that waits or hangs, if there is one."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        if self._process is None or item.nodeid not in self._process.expected or not self._process.starts(item.nodeid):
            self.close()
            self._process = _Process(item, _rest_of_file(item))
            if not self._process.starts(item.nodeid):
                return [_end_of_process(item, self._process, "setup")]
        found = [_report(item.config, data) for data in self._process.reports(item.nodeid)]
        if not self._process.finished(item.nodeid):
            when = ("setup", "call", "teardown")[min(len(found), 2)]
            found.append(_end_of_process(item, self._process, when))
        return found


class _Process:
    """pytest on some tests of one file, whose lines of JSON this process reads as they are written."""

    def __init__(self, item: pytest.Item, expected: Sequence[str]) -> None:
        self.expected = set(expected)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "tests.json").write_text(json.dumps(expected), encoding="utf-8")
        self._lines = _Lines(folder / "reports")
        self._output = folder / "output"
        root = str(item.config.rootpath)
        # what the host prints in a fault goes to the output, and is not lost with pytest's captures of files
        options = ["-p", __name__, "-p", "no:cacheprovider", "--capture=sys", "--rootdir", root]
        command = [sys.executable, "-m", "pytest", *options, "--isolated-from", str(folder), str(item.path)]
        with self._output.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(command, cwd=root, stdout=output, stderr=subprocess.STDOUT)

    def starts(self, nodeid: str) -> bool:
        """Wait for the test to start; False: the process ends without it."""
        return self._wait_for({_STARTED: nodeid})

    def reports(self, nodeid: str) -> list[dict[str, Any]]:
        """Wait for the end of the test, or of the process; return the reports on it."""
        self._wait_for({_FINISHED: nodeid})
        return [line[_REPORT] for line in self._lines.seen if _REPORT in line and line[_REPORT]["nodeid"] == nodeid]

    def finished(self, nodeid: str) -> bool:
        return {_FINISHED: nodeid} in self._lines.seen

    def how_it_ended(self) -> str:
        """The exit code or signal, and the end of what the process printed."""
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        return f"the process of this test ended with {how}\n{self._output.read_text(errors='replace')[-MAX_OUTPUT:]}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _wait_for(self, line: dict[str, str]) -> bool:
        while line not in self._lines.seen:
            ended = self._process.poll() is not None
            if not self._lines.read() and ended:
                return False
            time.sleep(0 if line in self._lines.seen else POLL_S)
        return True


class _Lines:
    """The lines of JSON of a file that another process appends to."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open(encoding="utf-8")
        self._rest = ""
        self.seen: list[dict[str, Any]] = []

    def read(self) -> bool:
        """Read what is there; False: nothing new."""
        text = self._file.read()
        *lines, self._rest = (self._rest + text).split("\n")
        self.seen += [json.loads(line) for line in lines]
        return bool(text)


def _report(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """The report that was written; what pytest expects as tuples are lists in JSON."""
    for name in ("location", "longrepr"):
        if isinstance(data[name], list):
            data[name] = tuple(data[name])
    return config.hook.pytest_report_from_serializable(config=config, data=data)


def _rest_of_file(item: pytest.Item) -> list[str]:
    """The test and those of its file behind it, in the order of the session."""
    items = item.session.items
    return [other.nodeid for other in items[items.index(item) :] if other.path == item.path]


def _end_of_process(item: pytest.Item, process: _Process, when: Any) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=process.how_it_ended(),
        when=when,
    )


# What follows runs in the process of a file's tests, where this module is a plugin.


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that the first process passes."""
    parser.addoption("--isolated-from", metavar="DIR", help="folder of tests.json and reports; see isolated_tests.py")


def pytest_configure(config: pytest.Config) -> None:
    """Report to the first process, if there is one."""
    if folder := config.getoption("--isolated-from"):
        wanted = json.loads((Path(folder) / "tests.json").read_text(encoding="utf-8"))
        config.pluginmanager.register(_Reporter(config, wanted, Path(folder) / "reports"), "isolated reporter")


def is_isolated(config: pytest.Config) -> bool:
    """Whether this process was started for the tests of one file."""
    return config.pluginmanager.has_plugin("isolated reporter")


def give_up_process(config: pytest.Config) -> None:
    """End this process behind the current test, because later ones would fail for its sake."""
    reporter = config.pluginmanager.get_plugin("isolated reporter")
    if reporter is not None:
        reporter.ruined = True


class _Reporter:
    """Selects the wanted tests, and writes a line when a test starts, for each report, and when it has finished."""

    def __init__(self, config: pytest.Config, wanted: list[str], path: Path) -> None:
        self.ruined = False
        self._config = config
        self._wanted = {nodeid: place for place, nodeid in enumerate(wanted)}
        self._file: TextIO = path.open("a", encoding="utf-8")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((x for x in items if x.nodeid in self._wanted), key=lambda x: self._wanted[x.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({_STARTED: nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._write({_REPORT: data})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write({_FINISHED: nodeid})
        if self.ruined:
            os._exit(1)  # without cleaning up: what is ruined may fail, or hang

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

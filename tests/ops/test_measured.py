import json
import multiprocessing
from pathlib import Path

import pytest

from engine.ops.measured import MeasuredChoices, default_directory, digest, fastest

KEY = {"what": "sum", "processor": "a", "threads": 2}


def parse(value: str) -> str:
    if value not in ("mkl", "onednn"):
        raise ValueError(f"{value} is no library")
    return value


class Measurement:
    """Counts how often it is called."""

    def __init__(self, result: str = "mkl") -> None:
        self.result, self.count = result, 0

    def __call__(self) -> str:
        self.count += 1
        return self.result


def choose(measure, *directories: Path, key=KEY) -> tuple[str, list[str]]:
    """The choice, and what was reported."""
    lines: list[str] = []
    return MeasuredChoices(directories, lines.append).choose(key, measure, str, parse), lines


def test_measured_once_for_a_machine(tmp_path):
    first, again = Measurement("mkl"), Measurement("onednn")
    assert choose(first, tmp_path / "new" / "folder") == ("mkl", [])
    assert choose(again, tmp_path / "new" / "folder") == ("mkl", [])
    assert (first.count, again.count) == (1, 0)


@pytest.mark.parametrize("changed", [{"processor": "b"}, {"threads": 1}, {"what": "product"}, {"version": 3}])
def test_measured_again_for_anything_else(tmp_path, changed):
    choose(Measurement("mkl"), tmp_path)
    assert choose(Measurement("onednn"), tmp_path, key=KEY | changed) == ("onednn", [])
    assert choose(Measurement("onednn"), tmp_path) == ("mkl", [])


def test_the_first_directory_decides_and_the_others_get_what_they_lack(tmp_path):
    run, machine = tmp_path / "run", tmp_path / "machine"
    choose(Measurement("mkl"), run)
    assert choose(Measurement("onednn"), run, machine) == ("mkl", [])
    assert choose(Measurement("onednn"), machine) == ("mkl", [])
    other = tmp_path / "other"
    choose(Measurement("onednn"), other)
    assert choose(Measurement(), run, other)[0] == "mkl"
    assert choose(Measurement(), other, run)[0] == "onednn"  # what a directory has is not replaced


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        json.dumps({"choice": "onednn"}).encode(),
        json.dumps({"key": KEY}).encode(),
        json.dumps({"key": KEY | {"processor": "b"}, "choice": "onednn"}).encode(),
        json.dumps({"key": KEY, "choice": "blis"}).encode(),
        json.dumps({"key": KEY, "choice": {}}).encode(),
    ],
)
def test_what_is_damaged_or_foreign_is_measured_again(tmp_path, content):
    choose(Measurement("onednn"), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    measure = Measurement("mkl")
    choice, lines = choose(measure, tmp_path)
    assert (choice, measure.count) == ("mkl", 1)
    assert len(lines) == 1 and str(path) in lines[0] and "is replaced" in lines[0]
    assert choose(measure, tmp_path) == ("mkl", [])
    assert measure.count == 1


def test_a_directory_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    choice, lines = choose(Measurement("mkl"), tmp_path / "file" / "measured")
    assert choice == "mkl"
    assert any("not kept" in line and "ops.measured_dir" in line for line in lines)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    choose(Measurement("mkl"), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"{")

    def write_half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode(encoding)[:9])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    choice, (_, line) = choose(Measurement("onednn"), tmp_path)
    assert choice == "onednn" and "no space left on device" in line
    assert path.read_bytes() == b"{" and list(tmp_path.iterdir()) == [path]


def _choose_often(directory: Path, result: str) -> None:
    for number in range(50):
        choose(Measurement(result), directory, key=KEY | {"threads": number})


def test_processes_share_a_directory(tmp_path):
    processes = [multiprocessing.Process(target=_choose_often, args=(tmp_path, r)) for r in ("mkl", "onednn") * 2]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    never = Measurement()
    for number in range(50):
        choice, lines = choose(never, tmp_path, key=KEY | {"threads": number})
        assert choice in ("mkl", "onednn") and lines == []
    assert never.count == 0
    assert len(list(tmp_path.iterdir())) == 50  # nothing unfinished


@pytest.mark.parametrize(
    "environment, directory",
    [
        ({"XDG_CACHE_HOME": "/somewhere", "HOME": "/home/me"}, "/somewhere/triaxis"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/triaxis"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/triaxis"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "relative"}, None),
    ],
)
def test_the_directory_of_a_machine(monkeypatch, environment, directory):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_directory() == (directory and Path(directory))


def test_the_fastest_is_that_of_the_best_times():
    times = {"a": [9.0, 1.0, 1.0], "b": [0.5, 8.0, 8.0], "c": [2.0, 0.9, 0.8]}
    order = []

    def seconds(candidate: str) -> float:
        order.append(candidate)
        return times[candidate].pop(0)

    assert fastest("abc", seconds, rounds=3, margin=0.05) == "b"
    assert "".join(order) == "abcabcabc"


def test_the_first_is_taken_unless_it_is_clearly_slower():
    for margin, expected in ((0.01, "b"), (0.03, "b"), (0.05, "a")):
        assert fastest("ab", {"a": 1.0, "b": 0.96}.__getitem__, rounds=1, margin=margin) == expected


def test_digests_are_positive_and_of_the_content():
    assert 0 < digest(KEY) < 2**63
    assert digest(KEY) == digest(dict(reversed(KEY.items()))) != digest(KEY | {"threads": 1})

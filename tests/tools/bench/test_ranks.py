"""The first runs of several ranks, on a CPU over the staging group."""

import gzip
from dataclasses import replace

import orjson
import pytest
import torch

import engine.train.step
from engine.errors import ConfigError
from tests.tools.bench.test_overlap import ONE_RANK, write
from tools.bench.ranks import RUNS, Result, _report_overlap, _traced, main
from tools.bench.results import Results, load

FINE = Result(0, 9.0, [2.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0], None, "")
FAILS = "pp 2, rank 1 fails in step 2"


def run(capsys, *options: str) -> tuple[int, list[list[str]], str]:
    """The exit code, the cells of the table, and what is said of runs that went wrong."""
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--backend", "staged", *options])
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if line[:1] == "|"]
    return ended.value.code, rows[2:], printed.err


def test_a_layout_trains_and_a_failing_rank_ends_the_other(capsys):
    code, (one, failing), problems = run(capsys, "--timeout", "120", "--only", "one rank", FAILS)
    assert (code, problems) == (0, "")
    whole, begun = ([float(loss) for loss in row[5].split(", ")] for row in (one, failing))
    assert len(whole) == 4
    assert begun == pytest.approx(whole[:1], rel=1e-5)
    assert failing[1] == "1"
    assert "after the error" in failing[2]


def test_a_rank_that_is_late_shows_its_stacks(capsys):
    code, (row,), problems = run(capsys, "--timeout", "0.3", "--only", "tp 2")
    assert code == 1
    assert row[1] == "1"
    assert row[5] == ""
    assert "== tp 2, exit code 1\n-- rank 0, stderr" in problems
    assert "Timeout (0:00:00.300000)!" in problems
    assert "in _train_on_rank" in problems


def test_settings_that_do_not_exist_are_refused_before_the_start():
    with pytest.raises(ConfigError, match=r"model\.hiden_size"):
        main(["--device", "cpu", "--backend", "staged", "--model.hiden_size", "64"])


def test_what_a_run_should_do():
    layout, fails = RUNS["dp 2"], RUNS[FAILS]
    assert FINE.is_as_expected(layout, None)
    assert FINE.is_as_expected(layout, FINE)
    assert not replace(FINE, exit_code=1).is_as_expected(layout, FINE)
    assert not replace(FINE, losses=FINE.losses[:3]).is_as_expected(layout, FINE)
    assert not replace(FINE, losses=[4.0, 3.0, 2.0, 1.001]).is_as_expected(layout, FINE)
    assert replace(FINE, losses=[4.0, 3.0, 2.0, 1.001]).is_as_expected(layout, FINE, 1e-2)
    assert not FINE.is_as_expected(fails, FINE)
    failed = replace(FINE, exit_code=1, losses=[4.0], ended_after=2.0, output="planted in step 2 of rank 1")
    assert failed.is_as_expected(fails, FINE)
    assert not replace(failed, exit_code=0).is_as_expected(fails, FINE)
    assert not replace(failed, output="something else").is_as_expected(fails, FINE)
    assert replace(FINE, exit_code=1, losses=[]).is_as_expected(RUNS["pp 2, not warmed up"], FINE)


def test_a_trace_has_the_last_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.train.step, "train_step", lambda x, *, step: x.sinh() * step)
    path = tmp_path / "rank0.json.gz"
    step = _traced(path)
    for number in range(1, 5):
        assert not path.exists()
        assert step(torch.zeros(1), step=number) == 0
    events = orjson.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert [event.get("name") for event in events].count("aten::sinh") == 2


def test_the_tables_of_traces(tmp_path, capsys):
    for name, events in (("tp 2", ONE_RANK), ("dp 2", [])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rank0.json.gz", events)
    bad: list[str] = []
    _report_overlap(tmp_path, ["one rank", "dp 2", "tp 2"], Results(tmp_path / "ranks.json", {"backend": "nccl"}), bad)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "dp 2" and "none of them a kernel of NCCL" in lines[3]
    assert lines[5] == "tp 2" and lines[-1] == "rank 0: 5.0 ms, computing 40.0%, only communicating 40.0%, idle 20.0%"
    rows = load(tmp_path / "ranks.json")["rows"]
    assert list(rows) == ["ranks dp 2, hidden communication", "ranks tp 2, hidden communication"]
    empty, row = rows.values()
    assert bad == ["dp 2"] and "none of them a kernel of NCCL" in empty["error"]
    together = row["overlap"][-1]
    assert (row["unit"], row["value"]) == ("%", pytest.approx(100 * together["hidden_ms"] / together["total_ms"]))
    assert together["axis"] == "all" and len(row["usage"]) == 1

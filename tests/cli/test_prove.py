"""The program that proves a layout: what it prints, what it finds, its errors."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from engine.cli import prove
from engine.cli.progress import ProgressDisplay
from engine.errors import ConfigError, TriaxisError
from engine.parallel.layout import World
from engine.testing.runs import run_config

PROGRAM = Path(__file__).parents[2] / "tools" / "prove.py"
SMALL = "--preset tiny --processes 1 --data.seq_length 64 --microbatches 2"


def main(line: str) -> None:
    """The program in this process."""
    prove.main(line.split())


def test_a_proof_and_what_a_step_communicates(capsys):
    main(f"--layout tp=2,pp=2,dp=2 {SMALL} --model.num_layers 2")
    out = capsys.readouterr().out
    assert out.startswith(
        "tp 2 × pp 2 × dp 2: no problem in groups, order, pairs, waits, memory; "
        "no hang with streams, one queue, synchronous\nrecorded       8 of 8 ranks, "
    )
    assert "schedule       1f1b, 2 microbatches of 1\n" in out
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines() if line.startswith("  ")}
    boundary = 64 // 2 * 64 * 2 / 1e6  # a rank's tokens of a microbatch × hidden size × bytes of bf16
    for channel in ("forward", "backward"):
        assert rows[channel, "send"] == ["2", "launches", f"{2 * boundary:.3f}", "MB"]
    assert rows["world", "all_reduce"][0] == "1"
    assert float(rows["dp", "reduce_scatter"][2]) == pytest.approx(2 * float(rows["dp", "all_gather"][2]), rel=0.1)
    assert "communicators  at most 5 on a rank: backward 1, dp 1, forward 1, tp 1, world 1\n" in out


def test_distinct_ranks_stand_for_all(capsys):
    """What is printed of a step is the same; only the number of recorded ranks differs."""
    line = f"--layout tp=4,pp=1,dp=3 {SMALL} --model.num_layers 1"
    main(line)
    some = capsys.readouterr().out.splitlines()
    main(f"{line} --all-ranks")
    every = capsys.readouterr().out.splitlines()
    assert some[1].startswith("recorded       6 of 12 ranks") and every[1].startswith("recorded       12 of 12 ranks")
    assert some[1].endswith("; the others run programs that are among these")
    assert (some[0], some[2:-1]) == (every[0], every[2:-1])


def test_several_processes_record_the_same(capsys):
    line = f"--layout dp=4 {SMALL} --all-ranks"
    main(line)
    one = capsys.readouterr().out.splitlines()[:-1]
    main(f"{line} --processes 2")
    assert capsys.readouterr().out.splitlines()[:-1] == one


def test_progress(monkeypatch, capsys):
    monkeypatch.setattr(prove, "ProgressDisplay", partial(ProgressDisplay, interval_s=0))
    main(f"--layout dp=3 {SMALL} --all-ranks")
    assert capsys.readouterr().err.splitlines()[-1] == "100.0%  3 of 3 ranks recorded  ETA 0:00"


def test_a_run_by_its_configuration(workspace, capsys):
    config = run_config(workspace, "--parallel.schedule", "zero_bubble", "--batch.global", "12")
    (workspace / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    main(f"--layout pp=2,dp=2 --config {workspace / 'config.yaml'} --processes 1 --batch.micro 2")
    assert "schedule       zero_bubble, 3 microbatches of 2\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"batch.global = 12"):
        main(f"--layout pp=2,dp=5 --config {workspace / 'config.yaml'}")


def test_one_rank_has_nobody_to_talk_to(capsys):
    main(f"--layout dp=1 {SMALL}")
    assert "sent per step" not in capsys.readouterr().out


def test_a_fault_is_an_error_with_all_problems(monkeypatch):
    original = World.sum_on_device
    monkeypatch.setattr(World, "sum_on_device", lambda self, x: None if self.rank == 1 else original(self, x))
    with pytest.raises(TriaxisError) as caught:
        main(f"--layout dp=64 {SMALL}")
    assert caught.value.exit_code == 1
    first, problem, *hangs = str(caught.value).split("\n")
    assert first == "4 problems in tp 1 × pp 1 × dp 64:"
    assert problem.startswith("  world group of ranks 0, 1, 2, 3, … (64), number 1: rank 0 all_reduce")
    assert problem.endswith("but rank 1 nothing more")
    assert [hang.split(":")[0].strip() for hang in hangs] == ["streams", "one queue", "synchronous"]


def test_many_problems_are_counted(monkeypatch):
    monkeypatch.setattr(prove, "failures", lambda records, symmetric: [f"problem {n}" for n in range(25)])
    with pytest.raises(TriaxisError) as caught:
        main(f"--layout dp=2 {SMALL}")
    lines = str(caught.value).split("\n")
    assert len(lines) == 22 and lines[-1] == "  … and 5 more"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--layout tp=2,tq=2 --preset tiny", r"--layout tp=2,tq=2: 'tq=2' is not an axis and its size"),
        ("--layout tp=2,tp=2 --preset tiny", "'tp=2' is not an axis"),
        ("--layout tp --preset tiny", "'tp' is not an axis"),
        ("--layout dp=0 --preset tiny", "dp = 0 ranks"),
        ("--layout tp=3 --preset tiny", "parallel.tp = 3 does not divide"),
        ("--layout dp=2 --preset tiny --microbatches 0", "--microbatches 0: expected at least 1"),
        ("--layout dp=2 --preset tiny --processes 0", "--processes 0: expected at least 1"),
        ("--layout pp=2 --preset tiny --parallel.pp 4", "--parallel.pp: --layout decides it here"),
        ("--layout pp=2 --preset tiny --parallel.tp=2", "--parallel.tp: --layout decides it here"),
        ("--layout dp=2 --preset tiny --batch.global 64", "--batch.global: --microbatches decides it here"),
        ("--layout dp=2 --preset tiny --parallel.schedle x", "parallel.schedle: no such setting"),
        ("--layout pp=2 --preset tiny --parallel.schedule interleaved", "virtual_stages"),
    ],
)
def test_what_does_not_work(line, message):
    with pytest.raises(ConfigError, match=message):
        main(line)


def test_a_model_is_required():
    with pytest.raises(ConfigError, match="one of the arguments --preset --config is required"):
        main("--layout dp=2")


def test_files_of_the_examples_exist():
    named = re.findall(r"--config (\S+)", prove.EXAMPLES)
    assert named and all((PROGRAM.parents[1] / name).is_file() for name in named)


def test_as_a_program():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)

    assert f"python {PROGRAM} --layout tp=8,pp=4,dp=32 --preset llama2-7b\n" in run("--help").stdout
    proven = run("--layout", "dp=2", *SMALL.split())
    assert proven.returncode == 0 and "no hang with streams, one queue, synchronous" in proven.stdout

"""The program that shows a schedule: its text, its picture, its errors."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cli import plan
from engine.errors import ConfigError
from engine.parallel.pipeline import check
from engine.parallel.pipeline.program import StepKind, build_program
from engine.parallel.pipeline.schedules import Schedule, ScheduleError, build_schedule

PROGRAM = Path(__file__).parents[2] / "tools" / "plan.py"


def main(line: str) -> None:
    """The program in this process."""
    plan.main(line.split())


def test_one_schedule(capsys):
    main("--schedule 1f1b --stages 2 --microbatches 3")
    assert capsys.readouterr().out == (
        "1f1b: verified for 2 stages and 3 microbatches\n"
        "stage 0  F0 F1 .  .  B0--- F2 B1--- .  B2---\n"
        "receives       B0             B1    B2\n"
        "stage 1  .  F0 B0--- F1 B1--- F2 B2--- .  .\n"
        "receives F0,F1          F2\n"
        "bubble  33.3% of the ideal time\n"
        "most activations in flight, in microbatches per stage  2 1\n"
        "receives posted at least one action ahead  33%; no message can hang\n\n"
    )


def test_all_schedules_in_one_picture(capsys, tmp_path):
    main(f"--schedule all --stages 4 --microbatches 8 --output {tmp_path / 'all.png'}")
    out = capsys.readouterr().out
    titles = ["gpipe", "1f1b", "interleaved, 2 chunks per stage", "zero_bubble"]
    assert [line.split(":")[0] for line in out.splitlines() if "verified" in line] == titles
    assert [line.split()[1] for line in out.splitlines() if line.startswith("bubble")] == [
        "37.5%",
        "37.5%",
        "18.8%",
        "12.5%",
    ]
    assert "per stage  5.5 4.5 3.5 2.5" in out
    assert out.endswith(f"written: {tmp_path / 'all.png'}\n")
    assert (tmp_path / "all.png").stat().st_size > 0


def test_costs_and_chunks(capsys):
    main("--schedule interleaved --chunks 3 --stages 1 --microbatches 1 --costs 3 6 9 --send 1")
    assert "stage 0  F0   F0.1 F0.2 B0.2-------------------- B0.1" in capsys.readouterr().out
    main("--schedule zero_bubble --stages 2 --microbatches 2 --costs 3 2 1")
    assert f"bubble  {(3 + 2 - 1) / (2 * 6):.1%}" in capsys.readouterr().out
    main("--schedule all --chunks 4 --stages 2 --microbatches 4")
    assert "bubble  6.2% of" in capsys.readouterr().out  # (2 − 1) / (4 · 4)


def test_a_send_takes_its_time(capsys):
    main("--schedule forward_only --stages 2 --microbatches 2 --send 1")
    assert "stage 1  .  .  F0 F1" in capsys.readouterr().out
    main("--schedule 1f1b --stages 8 --microbatches 32 --send 0.03")
    assert "time against all receives posted from the start  +0.05%" in capsys.readouterr().out


def test_every_schedule_up_to_a_size(capsys):
    """gpipe, 1f1b and zero_bubble, interleaved with 2 and 3 chunks, evaluation with 1 to 3."""
    main("--schedule all --stages 3 --microbatches 4 --chunks 3 --up-to")
    assert capsys.readouterr().out.endswith("96 schedules verified: no message can hang\n")
    main("--schedule gpipe --stages 2 --microbatches 3 --up-to")
    assert capsys.readouterr().out.endswith("6 schedules verified: no message can hang\n")
    with pytest.raises(ConfigError, match=r"--output x\.png: --up-to draws no schedule"):
        main("--schedule gpipe --stages 2 --microbatches 3 --up-to --output x.png")


def test_a_fault_in_any_of_them_is_found(monkeypatch):
    def without_sends(schedule: Schedule):
        good = build_program(schedule)
        steps = tuple(tuple(step for step in row if step.kind is not StepKind.SEND) for row in good.steps)
        return replace(good, steps=steps) if schedule.num_stages == 3 and schedule.num_microbatches == 4 else good

    monkeypatch.setattr(check, "build_program", without_sends)
    with pytest.raises(ScheduleError, match="stage 0, F0: its result is not sent where it is needed"):
        main("--schedule 1f1b --stages 3 --microbatches 4 --up-to")


def test_what_is_shown_is_proven(monkeypatch):
    def without_last_action(*arguments) -> Schedule:
        good = build_schedule(*arguments)
        return replace(good, actions=(good.actions[0][:-1], *good.actions[1:]))

    monkeypatch.setattr(plan, "build_schedule", without_last_action)
    with pytest.raises(ScheduleError, match="stage 0, B2: missing"):
        main("--schedule 1f1b --stages 2 --microbatches 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--schedule 1f1b --stages 2 --microbatches 0", "microbatches = 0"),
        ("--schedule 1f1b --chunks 2 --stages 2 --microbatches 2", "virtual_stages = 2"),
        ("--schedule 1f1b --stages 2 --microbatches 2 --costs 1 0 1", r"--costs = \[1.0, 0.0, 1.0\]"),
        ("--schedule 1f1b --stages 2 --microbatches 2 --send -1", "--send = -1.0"),
        ("--schedule 1f1b --stages 2 --microbatches 2 --output a.doc", "a.doc"),
    ],
)
def test_what_does_not_work(line, message):
    with pytest.raises(ConfigError, match=message):
        main(line)


def test_as_a_program():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)

    example = "--schedule 1f1b --stages 4 --microbatches 8"
    assert f"python {PROGRAM} {example}\n" in run("--help").stdout
    assert "bubble  37.5%" in run(*example.split()).stdout
    failed = run("--schedule", "1f1b", "--stages", "0", "--microbatches", "8")
    assert failed.returncode == 64
    assert failed.stderr.startswith("error: parallel.pp = 0; a pipeline needs at least 1\nexit 64:")


def test_the_page_on_communication_shows_what_is_printed(capsys):
    page = (PROGRAM.parents[1] / "docs" / "communication.md").read_text(encoding="utf-8")
    main("--schedule 1f1b --stages 3 --microbatches 5")
    assert f"```\n{capsys.readouterr().out.rstrip()}\n```" in page
    main("--schedule all --stages 8 --microbatches 32 --send 0.03")
    lines = capsys.readouterr().out.splitlines()
    shares = [line.split()[7].rstrip("%;") for line in lines if line.startswith("receives posted")]
    costs = [line.split()[-1].rstrip("%") for line in lines if line.startswith("time against")]
    assert f"| by the rule | {' | '.join(f'{share} %' for share in shares)} |" in page
    assert f"of a forward | {' | '.join(f'{cost} %' for cost in costs)} |" in page

"""tools/bench/gpu.sh: stages that end in every way, what they leave, and a rehearsal on the CPU from end to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.bench.gpu import __main__ as program
from tools.bench.gpu.stages import ROOT, Stage
from tools.bench.results import load

SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tools.bench.results import Results
results = Results(Path(sys.argv[sys.argv.index("--json") + 1]), {{"gpu": "none", "torch": "0", "commit": "abc"}})
results.add("first", {{"value": 1.0, "unit": "ms"}})
"""
ENDS = {
    "good": "print('fine')",
    "raises": "results.add('second', {'error': 'too large'}); raise SystemExit(1)",
    "killed": "os.kill(os.getpid(), 9)",
    "hangs": "print('waits', flush=True); time.sleep(99)",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Stages that are small scripts, on a machine that lacks Liger; returns how they are run."""
    chosen = []
    for name, end in ENDS.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(root=str(ROOT)) + end)
        chosen.append(Stage(name, f"what {name} shows", (str(tmp_path / f"{name}.py"),), 5, ()))
    chosen.append(Stage("needs-liger", "nothing here", ("none.py",), 5, ("liger",)))
    chosen.append(Stage("good-again", "whether the others went on", chosen[0].command, 5, ()))
    monkeypatch.setattr(program, "stages", lambda scale, nccl=None: chosen)
    monkeypatch.setattr(program, "LIMIT_S", 6)
    monkeypatch.setattr(program, "_prepare", lambda options, statuses: {"liger": "not installed"})
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest's stay
    report = program._report

    def run(*arguments: str) -> tuple[int, dict]:
        monkeypatch.setattr(program, "_report", report if "--against" in arguments else lambda options, scale: 0)
        results = tmp_path / "results"
        code = program.main(["--rehearse", "--results", str(results), *arguments])
        return code, {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}

    return run


def test_whatever_ends_a_stage_it_leaves_its_file_and_the_others_run(fakes, capfd):
    code, files = fakes()
    assert code == 1
    stages = {name: file["stage"] for name, file in files.items()}
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "good": "done",
        "raises": "failed",
        "killed": "failed",
        "hangs": "failed",
        "needs-liger": "not run",
        "good-again": "done",
    }
    assert stages["killed"]["problem"] == "ended by SIGKILL"
    assert stages["hangs"]["problem"] == "stopped at its limit of 6 s"
    assert any("waits" in line for line in stages["hangs"]["output"])
    assert stages["needs-liger"]["problem"] == "no liger: not installed"
    for name in ENDS:
        assert files[name]["rows"]["first"] == {"value": 1.0, "unit": "ms"}
        assert files[name]["machine"] == {"gpu": "none", "torch": "0", "commit": "abc"}
    printed = capfd.readouterr()
    assert "== 2/6 raises: about 5 s" in printed.out
    assert "raises                          failed: exit code 1 (1 of 2: second)" in printed.out
    assert "error: failed: raises killed hangs\nerror: not run: needs-liger\n" in printed.err


def test_stages_by_name_and_the_exit_code_of_a_good_run(fakes, capfd):
    assert fakes("--stages", "needs")[0] == 1  # what begins with "needs-"
    code, files = fakes("--stages", "good")
    assert (code, sorted(files)) == (0, ["good", "needs-liger"])
    with pytest.raises(SystemExit) as ended:
        fakes("--stages", "goo")
    assert ended.value.code == 64
    assert "error: --stages goo: expected one of good, raises" in capfd.readouterr().err


def test_a_budget_skips_what_does_not_fit(fakes):
    code, files = fakes("--stages", "good", "--budget", "0.01")
    assert code == 1
    assert files["good"]["stage"]["problem"].startswith("it needs about 5 s, and ")
    assert fakes("--stages", "good", "--budget", "5")[0] == 0
    _, files = fakes("--stages", "good", "--budget", "0.01")
    assert files["good"]["rows"] == {"first": {"value": 1.0, "unit": "ms"}}  # as measured before


def test_changes_since_an_earlier_run(fakes, tmp_path, capfd):
    fakes("--stages", "good")
    before = tmp_path / "before"
    (tmp_path / "results").rename(before)
    document = load(before / "good.json")
    document["rows"]["first"]["value"] = 4.0
    (before / "good.json").write_text(json.dumps(document))
    capfd.readouterr()
    assert fakes("--stages", "good", "--against", str(before / "good.json"))[0] == 0
    assert "better  -75.0%  first: 4 -> 1 ms" in capfd.readouterr().out


def shell(*arguments: str, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    command = ["bash", str(ROOT / "tools" / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "arguments",
    [["--stages", "nonsense"], ["--unknown", "1"], ["--budget", "x"], ["--bundle", "/none"], ["--against", "/none"]],
)
def test_wrong_arguments(arguments):
    done = shell(*arguments)
    assert done.returncode == 64, done.stderr
    assert "error: " in done.stderr


def test_the_list_says_what_each_stage_decides():
    done = shell("--list", "--stages", "step", "accumulate")
    lines = done.stdout.splitlines()
    assert lines[0].split(maxsplit=3)[:3] == ["accumulate", "20", "s"]
    assert "step-transformers-liger" in done.stdout
    assert "kernels-" not in done.stdout


def test_a_rehearsal(tmp_path):
    """Real programs in their processes, from the environment to the report; what needs a GPU says so."""
    results = tmp_path / "results"
    chosen = ["accumulate", "tests-norm", "sustained", "step-bf16", "kernels-norms", "attention"]
    done = shell("--rehearse", "--results", str(results), "--commit", "abc", "--stages", *chosen)
    files = {path.stem: load(path) for path in results.glob("*.json")}
    assert not [name for name, file in files.items() if file["stage"]["status"] == "failed"], done.stdout
    assert done.returncode == 1  # as some cannot run
    for name in ("accumulate", "tests-norm", "kernels-norms"):
        assert files[name]["stage"]["status"] == "not run"
        assert files[name]["stage"]["problem"].startswith("no gpu: torch finds no GPU")
    assert "error: not run: accumulate tests-norm " in done.stderr
    environment = files["environment"]
    assert environment["machine"]["commit"] == "abc"
    assert environment["machine"]["versions"]["python"].startswith("3.")
    assert "gpu" in environment["lacks"]
    step = files["step-bf16"]["rows"]
    assert step["tiny bf16, whole step"]["unit"] == "tokens/s"
    profile = step["tiny bf16, whole step, profile"]
    assert profile["launches"] == sum(launches for _, launches in profile["kernels"].values()) > 100
    assert files["sustained"]["rows"]["bf16 matmul 128³, 0.001 s"]["calls"] >= 1
    assert files["attention"]["rows"]["attention sdpa, 1 × 32"]["unit"] == "ms"
    assert "needs a GPU" in files["attention"]["rows"]["attention varlen, 1 × 32"]["skipped"]
    page = (results / "report.md").read_text(encoding="utf-8")
    assert "| bf16 | | | **" in page
    assert "| blockwise | | | not run | | | | | | | |" in page
    assert "| matmuls, forward and input gradient |" in page
    assert "tables: " in done.stdout


def test_an_interrupted_run_ends_its_stage_and_reports(tmp_path):
    results = tmp_path / "results"
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    command = ["bash", str(ROOT / "tools" / "bench" / "gpu.sh"), "--rehearse", "--results", str(results)]
    run = subprocess.Popen([*command, "--stages", "step-blockwise"], env=env, stdout=subprocess.PIPE, text=True)
    file = results / "step-blockwise.json"
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 130
    assert load(file)["stage"]["problem"] == "interrupted"
    assert "whole step of tiny" in output


def test_the_shell_script_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in Path(ROOT / "tools").rglob("*.sh")]
    assert subprocess.run(["shellcheck", *scripts], capture_output=True, text=True).stdout == ""

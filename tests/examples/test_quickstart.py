import importlib.util
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from engine.cli import chat, generate, inspect
from engine.cli import train as training
from engine.cli.settings import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The program, in an empty directory."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def write_run(directory, losses, resumed=None):
    directory.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss, "grad_norm": norm}) for step, (loss, norm) in losses.items()]
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (directory / "events.jsonl").write_text(f"{json.dumps({'event': 'resume', 'step': resumed})}\n" * bool(resumed))


@pytest.mark.parametrize(
    ("twin", "said"),
    [
        ({10: (4.0, 1.0), 20: (3.0, 1.0), 30: (2.0, 1.0)}, None),
        ({10: (4.0, 1.0), 20: (3.0, 1.0), 30: (2.0000000000000004, 1.0)}, r"differ at steps \[30\]"),
        ({10: (4.0, 1.0), 20: (3.0, 1.0), 30: (2.0, 1.0000000000000002)}, r"differ at steps \[30\]"),
        ({10: (4.0, 1.0), 20: (3.0, 1.0)}, "last step, 20, is not behind the interruption at 21"),
    ],
    ids=["equal", "another loss after the resume", "another gradient norm", "no step after the resume"],
)
def test_the_proof_compares_losses_behind_the_interruption(quickstart, capsys, twin, said):
    write_run(quickstart.RUN, {10: (4.0, 1.0), 20: (3.0, 1.0), 30: (2.0, 1.0), 40: (1.0, 1.0)}, resumed=21)
    write_run(quickstart.TWIN, twin)
    if said is None:
        quickstart.compare_losses()
        assert "equal to the last bit; 1 of them come after the resume" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match=said):
            quickstart.compare_losses()


def test_a_stage_says_how_long_it_will_take_at_the_pace_of_the_machine(quickstart, capsys):
    expected = quickstart.EXPECTED_S
    assert quickstart.pace([0.5]) == 1  # too little to judge by
    assert quickstart.pace([2.0 * seconds for seconds in expected[:4]]) == pytest.approx(2)
    times = [(3.0 * seconds, 1.0) for seconds in expected[:4]]
    with quickstart.stage(times, "Title"):
        pass
    assert len(times) == 5
    assert f"=== 5/{len(expected)}  Title (about {3 * expected[4]} s)" in capsys.readouterr().out


def test_there_is_an_expected_time_for_each_stage(quickstart):
    source = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert source.count("    with stage(") == len(quickstart.EXPECTED_S)


def test_the_commands_at_the_end_are_valid(quickstart, monkeypatch, capsys):
    """The parser of its verb accepts each, and it works on what the quickstart makes."""
    made = {quickstart.RUN, quickstart.TUNED, quickstart.DATA / "questions_sft", quickstart.CONFIG}
    for (verb, *arguments), _ in quickstart.NEXT:
        assert arguments[0] in made
        words = list(map(str, arguments))
        parser = {"generate": generate, "chat": chat, "inspect": inspect, "train": training}[verb].parser()
        _, overrides = parser.parse_known_args(words)
        if verb == "train":
            assert load_config(str(ROOT / words[0]), overrides).train.steps == 2000
        else:
            assert not overrides
    monkeypatch.setenv("VIRTUAL_ENV", str(Path.cwd() / ".venv"))
    quickstart.print_next()
    assert re.search(r" \. \.venv/bin/activate\n.* triaxis generate runs/quickstart --prompt", capsys.readouterr().out)


def test_the_questions_are_about_documented_names(quickstart):
    questions = list(islice(quickstart.questions(), 50))
    assert len(questions) == 50
    assert all("." in name and answer and "\n" not in answer for name, answer in questions)


def test_the_twin_runs_on_behind_the_interruption(quickstart):
    """Both steps are recorded ones, so that the proof does not depend on how fast a signal is handled."""
    config = load_config(str(ROOT / quickstart.CONFIG), [])
    assert quickstart.INTERRUPTED % config.log.interval == quickstart.COMPARED % config.log.interval == 0
    assert quickstart.INTERRUPTED + 2 * config.log.interval <= quickstart.COMPARED < config.train.steps
    assert config.model.vocab_size == quickstart.VOCAB_SIZE

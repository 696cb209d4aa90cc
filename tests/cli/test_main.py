"""The command `triaxis`: its verbs, their help, and how the ways to start it name each other."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
from engine.cli.arguments import command_name
from engine.cli.main import VERBS, main, verb_module
from engine.cli.version import commit
from engine.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_help_lists_every_verb_and_needs_no_torch():
    script = "import sys; from engine.cli.main import main\ntry: main(['--help'])\n"
    script += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for verb, summary in VERBS.items():
        assert f"  {verb:15}{summary}\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_names_itself_and_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith(f"usage: triaxis {verb} ")
    assert verb == "env" or f"\n  triaxis {verb}" in said
    assert "%(" not in said


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_accepted_by_the_parser(verb, capsys):
    """Each example of a verb's help, without what a shell does with it."""
    module = verb_module(verb)
    lines = module.parser().format_help().replace("\\\n", " ").splitlines()
    for line in (line.partition(" # ")[0] for line in lines if line.startswith(f"  triaxis {verb} ")):
        words = shlex.split(line.partition(" > ")[0])[2:]
        module.parser().parse_known_args(words)


def test_a_misspelled_verb_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^no such verb: trian \(did you mean 'train'\?\)"):
        main(["trian", "tiny"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train"], "^the following arguments are required: CONFIG; see triaxis train --help$"),
        (["train", "tiny", "--ranks", "x"], "^--ranks: invalid int value: 'x'"),
        (["plan", "--schedule", "zigzag"], "^--schedule: invalid choice: 'zigzag'"),
        ([], "^a verb is missing: train, check"),
    ],
)
def test_a_wrong_command_line_is_an_error_like_others(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        main(arguments)


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_the_first_rank_of_a_node_speaks_for_all(rank, prints, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert ("usage: " in capsys.readouterr().out) == prints
    with pytest.raises(ConfigError) as caught:
        main(["train"])
    assert caught.value.reported_elsewhere != prints


def test_the_version_has_the_commit_and_what_csrc_was_built_with(capsys):
    main(["--version"])
    first, second, third = capsys.readouterr().out.splitlines()
    described = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert first == f"triaxis {engine.__version__} ({commit()})"
    assert described.returncode or commit().startswith(described.stdout[:12])
    assert second == f"torch   {torch.__version__}"
    assert third.startswith("csrc    ")


@pytest.mark.parametrize(
    ("program", "verb", "named"),
    [
        ("/venv/bin/triaxis", "chat", "triaxis chat"),
        ("/site-packages/engine/__main__.py", "chat", "python -m engine chat"),
        ("tools/preprocess_data.py", "inspect", "python tools/inspect_data.py"),
        ("/home/me/triaxis/tools/convert_checkpoint.py", "chat", "python /home/me/triaxis/tools/generate.py --chat"),
        ("tools/prove.py", "config", "python -m engine config"),
        ("examples/sft_7b.sh", "config", "python -m engine config"),
        ("/site-packages/pytest/__main__.py", "train", "triaxis train"),
    ],
)
def test_a_program_names_the_next_command_as_it_was_started(monkeypatch, program, verb, named):
    monkeypatch.setattr(sys, "argv", [program])
    assert command_name(verb) == named


def test_a_script_of_tools_has_no_logic():
    for script in ("generate", "preprocess_data", "inspect_data", "train_tokenizer", "convert_checkpoint", "plan"):
        assert len((ROOT / f"tools/{script}.py").read_text().splitlines()) == 7

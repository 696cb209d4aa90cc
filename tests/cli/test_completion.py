"""Completion scripts: valid in each shell, and bash completes verbs, recipes, settings and their values."""

import shutil
import subprocess

import pytest

from engine.cli.completion import SHELLS, main

pytest.importorskip("shtab")
COMPLETE = """
source {script}
COMP_WORDS=({words} '{last}'); COMP_CWORD={position}; COMPREPLY=()
_shtab_triaxis triaxis '{last}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The script of each shell."""
    from contextlib import redirect_stdout

    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with (folder / shell).open("w") as file, redirect_stdout(file):
            main([shell])
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_valid(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert subprocess.run([shell, "-n", scripts / shell], capture_output=True).returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_verbs_recipes_and_settings(scripts, shell):
    text = (scripts / shell).read_text()
    for part in ("checkpoints", "llama2-7b", "parallel.schedule", "zero_bubble", "max-new-tokens"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "last", "expected"),
    [
        ("triaxis", "t", ["tokenizer", "train"]),
        ("triaxis train", "lla", ["llama2-7b", "llama3-8b", "llama3.1-8b"]),
        ("triaxis train tiny", "--parallel.sch", ["--parallel.schedule"]),
        ("triaxis train tiny --parallel.schedule", "", ["1f1b", "gpipe", "interleaved", "zero_bubble"]),
        ("triaxis inspect", "--v", ["--verify", "--vocab-size"]),
    ],
)
def test_bash_completes(scripts, tmp_path, words, last, expected):
    program = COMPLETE.format(script=scripts / "bash", words=words, last=last, position=len(words.split()))
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == expected, done.stderr

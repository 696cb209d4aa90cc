"""The commands of README.md and docs/*.md: run in the order of a page, or checked if the page says why not.

- A ```sh block runs. All blocks of a page run in one shell, in a copy of the repository with the files of `bring`.
- After a line `<!-- not run: REASON -->`, a ```sh block is only checked: its files and extras exist, and its commands
  pass the parsers of their verbs and the loader of configurations.
- A ```yaml block is a fragment of a configuration, which the loader accepts.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.cli.arguments import _SCRIPTS
from engine.config.load import read_yaml, resolve
from engine.config.recipes import find_config
from engine.model.families import PRESETS
from tests.e2e.commands import ENVIRONMENT, ROOT
from tests.e2e.models import write_llama
from tests.e2e.pages import Block, blocks, executed, run_blocks

PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
IN_AN_EMPTY_DIRECTORY = "start.md"  # tests/e2e/test_wheel.py runs its commands
NOT_COPIED = (".git", ".venv", "build", "dist", "data", "runs", "models")  # of the root
BLOCKS = [(name, block) for name, page in PAGES.items() for block in blocks(page)]
CHECKED = [pytest.param(name, block.text, id=f"{name}:{block.line}") for name, block in BLOCKS if block.not_run]
FRAGMENTS = [
    pytest.param(b.text, id=f"{name}:{b.line}") for name, b in BLOCKS if b.language == "yaml" and not b.not_run
]
STARTS = (
    r"triaxis (?P<verb>\w[\w-]*)",
    r"(python|torchrun\b.*) -m engine (?P<verb>\w[\w-]*)",
    r"python (?P<script>tools/\w+\.py)",
)


@pytest.mark.parametrize("name", [name for name in PAGES if executed(PAGES[name]) and name != IN_AN_EMPTY_DIRECTORY])
def test_the_commands_of_a_page_run(name, tmp_path):
    home = tmp_path / "triaxis"
    shutil.copytree(ROOT, home, ignore=lambda at, _: NOT_COPIED if Path(at) == ROOT else ["__pycache__"])
    bring(home, PAGES[name])
    program = tmp_path / "bin/triaxis"  # as an installation of this tree has it
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom engine.cli.main import start\nstart()\n", encoding="utf-8")
    program.chmod(0o755)
    path = f"{program.parent}:{ENVIRONMENT['PATH']}"
    run_blocks(executed(PAGES[name]), home, ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(home)})


def test_a_page_ends_at_its_first_failing_command(tmp_path):
    page = ["cd .\nNUMBER=1\n", "echo $NUMBER > said\nfalse | cat\necho 2 >> said\n"]
    with pytest.raises(AssertionError, match="line 8"):
        run_blocks([Block(line, "sh", text) for line, text in zip((3, 8), page, strict=True)], tmp_path, ENVIRONMENT)
    assert (tmp_path / "said").read_text() == "1\n"


def bring(home: Path, page: str) -> None:
    """Write what a reader of the page brings: chats.jsonl, corpus.jsonl and the Hugging Face directory models/base."""
    turns = [{"role": "user", "content": "What is a stage?"}, {"role": "assistant", "content": "Some of the layers."}]
    (home / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 40, encoding="utf-8")
    texts = [{"text": path.read_text(encoding="utf-8")} for path in sorted(ROOT.glob("docs/*.md"))]
    (home / "corpus.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
    if any("models/base" in block.text for block in executed(page)):
        write_llama(home / "models/base")


@pytest.mark.parametrize(("name", "text"), CHECKED)
def test_commands_that_cannot_run_would_be_accepted(name, text):
    check_commands(text, PAGES[name])


@pytest.mark.parametrize("text", FRAGMENTS)
def test_a_fragment_of_a_configuration_is_accepted(text):
    fragment = yaml.safe_load(text)
    recipe = read_yaml(find_config("sft-llama2-7b" if fragment.get("task") == "sft" else "llama2-7b"))
    merged = recipe | {
        key: (recipe.get(key, {}) if key != "model" else {}) | value if isinstance(value, dict) else value
        for key, value in fragment.items()
    }
    resolve(merged, presets=PRESETS, source="the page", trained=_trained)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("triaxis pre-train llama2-7b", "no verb pre_train"),
        ("triaxis train llama-2-7b --gpus 8", "no recipe of that name"),
        ("RUNS=1 triaxis train llama2-7b --gpus 8 --train.stepz 3", "train.stepz"),
        ("torchrun --nproc-per-node 8 -m engine train llama2-7b --optimizer.lr -1", "optimizer.lr"),
        ("triaxis convert --form runs/llama2-7b --to out", "--from"),
        ("cd out && python tools/inspect_data.py --sample x data/a", "--sample"),
        ("triaxis train mine.yaml --gpus 8", "mine.yaml"),
        ("bash examples/pretrain_8b.sh", "examples/pretrain_8b.sh"),
        ("pip install 'triaxis[hf,hg]'", "hg"),
        ("triaxis check 'llama2-7b", "unexpected EOF"),
    ],
)
def test_a_wrong_command_is_found(command, problem):
    with pytest.raises(Exception, match=problem):
        check_commands(command, page="")


def check_commands(text: str, page: str) -> None:
    """Check each command of a block, without running it.

    Raises:
        Exception: a command would be refused; with the reason.
    """
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert not parsed.stderr, parsed.stderr
    for words in _commands(text):
        program = next((word for word in words if word.startswith(("examples/", "tools/", "tests/"))), None)
        assert words[0] == "triaxis" or program is None or (ROOT / program).exists(), f"{program} does not exist"
        if "install" in words:
            asked = {
                extra for found in re.findall(r"(?:triaxis|\.)\[(.+)\]", " ".join(words)) for extra in found.split(",")
            }
            unknown = asked - set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
            assert not unknown, f"no such extra: {unknown}"
        command = shlex.join(words)
        for pattern in STARTS:
            if start := re.match(rf"{pattern}(?: |$)", command):
                _check_verb(start.groupdict(), shlex.split(command[start.end() :]), page)
                break


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without assignments before it and redirections behind it."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        for token in [*lexer, ";"]:
            if token and set(token) <= set("();|&"):
                if words:
                    yield words[: next((i for i, word in enumerate(words) if set(word) <= set("<>")), None)]
                words = []
            elif words or not re.match(r"\w+=", token):
                words.append(token)


def _check_verb(start: dict[str, str | None], arguments: Sequence[str], page: str) -> None:
    """Give the arguments of a verb, or of a script of tools/, to its parser, and a configuration to the loader."""
    verbs = {f"tools/{script.split()[0]}": verb for verb, script in reversed(_SCRIPTS.items())}
    verb = (start.get("verb") or verbs[start["script"] or ""]).replace("-", "_")
    assert (ROOT / f"engine/cli/{verb}.py").exists(), f"no verb {verb}"
    parser: argparse.ArgumentParser = import_module(f"engine.cli.{verb}").parser()

    def refuse(message: str) -> None:
        raise ValueError(f"{verb} {shlex.join(arguments)}: {message}")

    parser.error = refuse  # type: ignore[assignment, method-assign]
    options, overrides = parser.parse_known_args(arguments)
    if getattr(options, "config", None) is None:
        assert not overrides, f"{verb} {shlex.join(arguments)}: no such option: {overrides}"
    else:
        raw = _configuration(options.config, page)
        resolve(raw, overrides, presets=PRESETS, source=options.config, trained=_trained)


def _configuration(name: str, page: str) -> dict[str, Any]:
    """A recipe, a file of the repository, or a file that a command of the page writes."""
    file = re.escape(name)
    if written := re.search(rf"^cat > {file} <<'?(\w+)'?\n(.*?)^\1$", page, re.M | re.S):
        return yaml.safe_load(written[2])
    if copied := re.search(rf"triaxis config (\S+) --source > {file}", page):
        name = copied[1]
    return read_yaml(find_config(str(ROOT / name) if (ROOT / name).is_file() else name))


def _trained(kind: str, path: Path) -> tuple[dict[str, Any], str]:
    """What the loader asks of a directory that only a reader has."""
    return dict(PRESETS["llama2-7b"]), str(path)

"""The comparison of published chat templates with `transformers`: what it collects, and that it sees what is wrong."""

import io
import re
import tarfile
import zipfile

import pytest

from engine.data.chat import turns
from engine.data.chat.builtin import BUILTIN
from tests.data.chat.test_turns import CALLS, THOUGHTS
from tools import chat_templates

PLAIN = {name: re.sub(r"{%-? *(end)?generation *-?%}", "", template.source) for name, template in BUILTIN.items()}


def test_templates_of_wheels_archives_and_folders(tmp_path):
    chatml, llama2 = PLAIN["chatml"], PLAIN["llama2"]
    with zipfile.ZipFile(tmp_path / "a-1.whl", "w") as wheel:
        wheel.writestr("a/chatml.jinja", chatml)
        wheel.writestr("a/mail.jinja", "{% for line in lines %}{{ line }}{% endfor %}")
        wheel.writestr("a/code.py", f"import os\nA = {llama2!r}\nB = {CALLS!r}\n")
    with tarfile.open(tmp_path / "b-1.tar.gz", "w:gz") as archive:
        for name, content in (("b/again.jinja", chatml.encode()), ("b/thoughts.jinja", THOUGHTS.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = chat_templates.templates([tmp_path])
    assert found == {
        "a/chatml.jinja": chatml, "a/code.py:0": llama2, "a/code.py:1": CALLS, "b/thoughts.jinja": THOUGHTS
    }  # fmt: skip


@pytest.mark.parametrize("source", [*PLAIN.values(), THOUGHTS, CALLS], ids=[*PLAIN, "thoughts", "calls"])
def test_ids_and_masks_are_right_or_refused(tmp_path, source):
    pytest.importorskip("transformers", minversion="5")
    outcomes = chat_templates.compare(source, tmp_path / "tokenizer")
    assert len(outcomes) == 20
    assert outcomes["one turn"] == outcomes["two turns"] == "equal"
    assert not [outcome for outcome in outcomes.values() if not outcome.startswith(("equal", "refused"))]


def test_wrong_masks_are_seen(tmp_path, monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    find = turns.TurnFinder.find
    monkeypatch.setattr(turns.TurnFinder, "find", lambda self, chosen: [(0, end) for _, end in find(self, chosen)])
    outcomes = chat_templates.compare(PLAIN["chatml"], tmp_path / "wide")
    assert outcomes["two turns"] == "WRONG MASK: told1 is a target"
    monkeypatch.setattr(turns.TurnFinder, "find", lambda self, chosen: find(self, chosen)[1:])
    outcomes = chat_templates.compare(PLAIN["chatml"], tmp_path / "narrow")
    assert outcomes["two turns"] == "WRONG MASK: said1 is not a target"

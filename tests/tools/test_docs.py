"""The documentation site: its pages as Python-Markdown needs them, the strict build, and the check of its links."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from engine.errors import ConfigError
from tools import docs
from tools.docs import ROOT, check, drawn, indented, linked, main


def test_the_site_builds_without_a_warning_or_a_dead_link(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    main(["--output", str(tmp_path / "site"), "--source", "https://host/blob/main", "--url", "https://host/triaxis/"])
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "<h1" in home and "https://host/blob/main/engine" not in home.partition("<article")[0]
    architecture = (tmp_path / "site/ARCHITECTURE.html").read_text(encoding="utf-8")
    assert 'href="https://host/blob/main/engine/errors.py"' in architecture and "mermaid" not in architecture


@pytest.mark.parametrize("text", ["[a](nothing.md)", "[a](docs/data.md#nothing)", "![a](docs/images/nothing.png)"])
def test_a_dead_link_ends_the_build(tmp_path, monkeypatch, text):
    pytest.importorskip("material", reason="needs the extra docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# Home\n\n{text}\n")
    (tmp_path / "docs/data.md").write_text("# Data\n")
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"extra_css.*|\nnav:[\s\S]*", "", (ROOT / "mkdocs.yml").read_text()))
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match="the site has warnings"):
        main(["--output", str(tmp_path / "site")])


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(
        str(path.relative_to(ROOT)) for pattern in docs.PAGES for path in ROOT.glob(pattern)
    )


def test_lists_are_indented_and_separated():
    code = "```\n- code\n  - code\n```\n**Bold**\n"
    github = f"Text\n- a\n  more\n  - b\n\n        code\n1. one\n   - two\n{code}- z"
    python = f"Text\n\n- a\n    more\n    - b\n\n            code\n1. one\n    - two\n{code}\n- z"
    assert "\n".join(indented(github.splitlines())) == python


@pytest.mark.parametrize(
    ("text", "on_the_site"),
    [
        ("[a](sft.md#data) ![b](images/c.png)", "[a](sft.md#data) ![b](images/c.png)"),
        ("[`a`](../engine/errors.py#L3)", "[`a`](https://h/engine/errors.py#L3)"),
        ("[a](../tools/bench)", "[a](../tools/bench/README.md)"),
        ("[a [b]](../engine/cli/)", "[a [b]](https://h/engine/cli)"),
        ("[a](https://b/c) [d](#e)", "[a](https://b/c) [d](#e)"),
        ("a\n  <!-- not run: needs\n  a GPU -->\n  text <!-- b -->", "a\n  text "),
    ],
)
def test_links_to_what_is_not_on_the_site(text, on_the_site):
    copied = {Path("docs/sft.md"), Path("docs/images/c.png"), Path("tools/bench/README.md")}
    assert linked(text, Path("docs/page.md"), copied, "https://h") == on_the_site


def test_without_a_source_links_to_files_are_text():
    assert linked("[a](../LICENSE)", Path("docs/page.md"), set(), None) == "a"


def test_a_graph_is_drawn_layer_by_layer():
    svg = drawn("```mermaid\nflowchart TD\n    top --> middle\n    top --> low\n    middle --> low\n```")
    places = dict(re.findall(r'y="(\d+)">(\w+)</text>', svg))
    assert sorted(places.values()) == ["low", "middle", "top"] and svg.count("<path") == 3
    assert [places[height] for height in sorted(places, key=int)] == ["top", "middle", "low"]
    assert drawn("```sh\nls\n```") == "```sh\nls\n```"


def test_the_check_of_a_site(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="a">x</h1><a href="b/c.html#d">c</a><a href="/site/index.html#a">home</a>'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.html").write_text(
        '<p id="d"><a href="../index.html#none">1</a><a href="none.html">2</a><a href="?q=1#d">3</a>'
        '<script src="https://cdn/x.js"></script><a href="https://elsewhere/">4</a><img src="none.png">'
    )
    (tmp_path / "b/lost.html").write_text('<a href="c.html">c</a>')
    assert sorted(check(tmp_path, "/site/")) == [
        "b/c.html has a dead link: ../index.html#none",
        "b/c.html has a dead link: none.html",
        "b/c.html has a dead link: none.png",
        "b/c.html loads https://cdn/x.js",
        "b/lost.html has no link to the home page",
    ]


def test_the_workflow_builds_with_the_extra_and_publishes_main_only():
    """It has not run here: its scripts parse, and their options are those of the program."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text(encoding="utf-8"))["jobs"]
    scripts = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    for script in scripts:
        plain = re.sub(r"\$\{\{.*?\}\}", "value", script)
        assert subprocess.run(["bash", "-n"], input=plain, text=True, capture_output=True).returncode == 0, script
    assert set(re.findall(r"--(output|source|url)", scripts[-1])) == {"output", "source", "url"}
    assert jobs["deploy"]["if"] == "github.event_name == 'push'" and jobs["deploy"]["needs"] == "build"

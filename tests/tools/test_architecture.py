"""ARCHITECTURE.md shows the tree as it is."""

import pytest

from engine.errors import ConfigError
from tools.architecture import BEGIN, END, FOLDERS, ROOT, graph, imports, layers, main, picture, replaced

FILES = {
    "top": "from house.middle.inner import f\nimport house.bottom\n",
    "middle": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house import bottom\n",
    "bottom": "import top\nfrom middle import g\nimport house.bottom\n",  # other packages, and itself
}


@pytest.fixture
def house(tmp_path):
    """A package with two modules and a package."""
    (tmp_path / "middle").mkdir()
    (tmp_path / "middle" / "__init__.py").touch()
    for name, source in FILES.items():
        file = tmp_path / f"{name}.py" if name != "middle" else tmp_path / "middle" / "inner.py"
        file.write_text(source, encoding="utf-8")
    return tmp_path


def test_the_document_shows_the_tree():
    main(["--check", str(ROOT / "ARCHITECTURE.md")])


def test_imports_become_arrows_and_layers(house):
    found = imports(house, "house")
    assert found == {"top": {"middle", "bottom"}, "middle": {"bottom"}, "bottom": set()}
    assert layers(found) == {"top": 2, "middle": 1, "bottom": 0}
    arrows = [line.strip() for line in graph(found).splitlines() if "-->" in line]
    assert arrows == ["top --> middle", "middle --> bottom"]  # top --> bottom follows


def test_a_circle_is_an_error(house):
    (house / "bottom.py").write_text("import house.top\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="import each other: bottom, middle, top"):
        layers(imports(house, "house"))


def test_every_package_is_in_the_graphs():
    text = picture()
    for folder in FOLDERS:
        for package in imports(ROOT / folder, folder.replace("/", ".")):
            assert f"[`{package}`]({folder}/{package}" in text


def test_an_outdated_document_is_refused_and_rewritten(tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(f"above\n{BEGIN}\noutdated\n{END}\nbelow\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"doc\.md is out of date; run python tools/architecture\.py --write"):
        main(["--check", str(document)])
    main(["--write", str(document), "--check", str(document)])
    written = document.read_text(encoding="utf-8")
    assert written.startswith(f"above\n{BEGIN}\n\n`engine/`\n\n```mermaid\nflowchart TD\n")
    assert written.endswith(f"|\n\n{END}\nbelow\n")
    assert "outdated" not in written


@pytest.mark.parametrize("content", ["no markers", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_a_document_without_its_markers(tmp_path, content):
    document = tmp_path / "doc.md"
    document.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="expected one line"):
        replaced(document, "text")
    with pytest.raises(ConfigError, match="expected one line"):
        replaced(tmp_path / "none.md", "text")

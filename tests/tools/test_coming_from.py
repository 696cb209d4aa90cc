"""docs/coming-from.md has the names of engine/config/foreign.py."""

import re
from pathlib import Path

import pytest

from engine.config.foreign import TRAINERS
from engine.errors import ConfigError
from tools.coming_from import main, tables

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"


def test_the_page_has_the_names_of_every_trainer():
    main(["--check", str(PAGE)])
    trainers = re.findall("<!-- names of (.+?): written by", PAGE.read_text(encoding="utf-8"))
    assert sorted(trainers) == sorted(set(TRAINERS) - {"any"})


def test_a_page_that_is_out_of_date_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        PAGE.read_text(encoding="utf-8").replace("| `train.steps` |", "| `train.stepz` |"), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="out of date"):
        main(["--check", str(page)])
    main(["--write", str(page)])
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_names_with_one_answer_share_a_row():
    names = {"a_b": "train.steps", "c": "train.steps", "d": "optimizer.lr; halved", "e": "not implemented: e"}
    assert tables(names).splitlines() == [
        "| theirs | here | |",
        "|---|---|---|",
        "| `a_b`, `c` | `train.steps` |  |",
        "| `d` | `optimizer.lr` | halved |",
        "",
        "| theirs | why there is no setting |",
        "|---|---|",
        "| `e` | not implemented: e |",
    ]

"""Pages and pictures of docs/ that follow from the code are up to date."""

import re

import pytest

from engine.cli import config
from engine.cli.main import VERBS
from engine.config.schema import Config, RopeScaling
from engine.errors import ConfigError
from tools import reference
from tools.reference import DOCS, command_line, description, kind, main, pages, plan_commands


def test_the_pages_and_pictures_are_up_to_date():
    main(["--check"])


def test_every_setting_is_there_with_type_default_and_meaning():
    lines = re.findall(r"^- \*\*`([\w.]+)`\*\* \((.+?); (.+?)\): \S.*\.$", pages()[DOCS / "settings.md"], re.M)
    found = {name for name, _, _ in lines}
    plain = {
        f"{section}.{field.alias or key}"
        for section, model in Config.model_fields.items() if hasattr(model.annotation, "model_fields")
        for key, field in model.annotation.model_fields.items()
    }  # fmt: skip
    assert found == plain | {
        "task", "data.train.path", "data.train.weight",
        *(f"model.rope_scaling.{name}" for name in RopeScaling.model_fields),
    }  # fmt: skip
    assert ("optimizer.lr", "number > 0", "default `0.0003`") in lines
    assert ("parallel.timeout_s", "integer ≥ 60 and ≤ 604,800", "default `1800`") in lines
    assert ("batch.global", "integer ≥ 1", "no default") in lines


def test_kinds_of_values():
    properties = config.schema()["$defs"]["ParallelConfig"]["properties"]
    assert kind(properties["tp"]) == "integer ≥ 1 or `auto`"
    assert kind(properties["schedule"]) == "`gpipe`, `1f1b`, `interleaved` or `zero_bubble`"
    assert kind(config.schema()["$defs"]["DataConfig"]["properties"]["split"]) == "list of 3 numbers"


def test_every_verb_is_there_with_its_options():
    page = command_line()
    assert re.findall(r"^## triaxis ([\w-]+)$", page, re.M) == list(VERBS)
    assert "- `--schedule gpipe|1f1b|interleaved|zero_bubble|forward_only|all`: " in page
    assert "- `--costs F I W`: time of a stage's forward" in page
    assert "- `--append-eod`: end every document" in page
    assert "%(" not in page and "python -m" not in page.partition("## triaxis train")[2]


def test_an_outdated_page_and_picture_are_named_and_rewritten(tmp_path, monkeypatch):
    for name in ("ROOT", "DOCS"):
        monkeypatch.setattr(reference, name, tmp_path)
    page = tmp_path / "page.md"
    page.write_text("`triaxis plan --schedule 1f1b --stages 2 \\\n --microbatches 3 --output docs/images/a.png`")
    (tmp_path / "docs/images").mkdir(parents=True)
    monkeypatch.setattr(reference, "pages", lambda: {tmp_path / "made.md": "text"})
    with pytest.raises(ConfigError, match=r"out of date: made\.md, docs/images/a\.png; run python tools/reference\.py"):
        main(["--check"])
    main(["--write"])
    main(["--check"])
    assert description(tmp_path / "docs/images/a.png").startswith("1f1b\nstage 0  F0 F1 .  .  B0--- F2 B1---")
    page.write_text(page.read_text().replace("--stages 2", "--stages 3"))
    with pytest.raises(ConfigError, match=r"out of date: docs/images/a\.png;"):
        main(["--check"])


def test_pages_show_pictures():
    assert plan_commands().keys() >= {DOCS / "images/posted-receives.png", DOCS / "images/schedules.png"}
    for picture in plan_commands():
        assert any(f"](images/{picture.name})" in page.read_text() for page in DOCS.glob("*.md"))

"""`triaxis config`: recipes, presets, the resolved configuration and the schema."""

import json

import pytest
import yaml

from engine.cli.config import main
from engine.config.recipes import recipes
from engine.errors import ConfigError
from engine.model.families import PRESETS


def test_it_lists_every_recipe_and_every_preset(capsys):
    main([])
    said = capsys.readouterr().out
    for name, path in recipes().items():
        comment = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        assert f"  {name:17}{comment}\n" in said
    for name in PRESETS:
        assert f"\n  {name:17}{PRESETS[name]['num_layers']} layers of " in said


def test_a_recipe_is_printed_resolved_or_as_it_is(capsys):
    main(["tiny", "--train.steps", "70"])
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 70
    main(["tiny", "--source"])
    assert capsys.readouterr().out == recipes()["tiny"].read_text(encoding="utf-8")


def test_a_preset_is_a_model_section(capsys):
    main(["--preset", "qwen3-8b"])
    assert yaml.safe_load(capsys.readouterr().out) == {"model": dict(PRESETS["qwen3-8b"])}


def test_the_schema_is_json(capsys):
    main(["--schema"])
    assert json.loads(capsys.readouterr().out)["title"] == "Config"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source"], "CONFIG is missing"),
        (["tiny", "--schema"], "need no CONFIG; leave out tiny"),
        (["tiny", "--source", "--train.steps", "7"], "leave out --train.steps 7"),
        (["tinny"], r"no recipe of that name \(did you mean 'tiny'\?\)"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments)

import pytest

from engine.config.load import load
from engine.config.recipes import find_config, recipes
from engine.errors import ConfigError
from engine.model.families import PRESETS


def test_every_recipe_loads_by_its_name():
    assert {"llama2-7b", "sft-llama2-7b", "tiny"} <= set(recipes())
    for name in recipes():
        trained = lambda kind, path: (PRESETS["tiny"], "byte")  # noqa: E731
        load(name, presets=PRESETS, trained=trained)


def test_a_file_of_the_user_wins_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("tiny") == recipes()["tiny"]
    (tmp_path / "tiny").mkdir()
    assert find_config("tiny") == recipes()["tiny"]
    (tmp_path / "quickstart").write_text("run: {}")
    assert str(find_config("quickstart")) == "quickstart"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "lama2-7b",
            r"^no configuration file at lama2-7b, and no recipe of that name \(did you mean 'llama2-7b'\?\); rec",
        ),
        ("here/tiny", "^no configuration file at here/tiny$"),
        ("tiny.yaml", "^no configuration file at tiny.yaml$"),
    ],
)
def test_what_is_neither_is_named(name, problem):
    with pytest.raises(ConfigError, match=problem):
        find_config(name)

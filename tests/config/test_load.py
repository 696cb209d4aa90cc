import pytest
import yaml

from engine.config.load import load, resolve
from engine.config.schema import Config
from engine.errors import CheckpointError, ConfigError
from engine.model.families import PRESETS
from tests.config.minimal import MINIMAL, build, message


def test_precedence_is_defaults_preset_file_command_line():
    config = build({"model": {"preset": "tiny", "hidden_size": 32}}, "--model.hidden_size", "96")
    assert config.model.hidden_size == 96  # command line over file over preset
    assert build({"model": {"preset": "tiny", "hidden_size": 32}}).model.hidden_size == 32
    assert config.model.num_layers == PRESETS["tiny"]["num_layers"]
    assert config.optimizer.lr == 3e-4


def test_overrides_are_yaml_and_come_in_two_forms():
    config = build(
        {},
        "--data.train=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]",
        "--optimizer.lr",
        "1e-3",
        "--log.tensorboard",
        "false",
        "--model.sliding_window",
        "null",
    )
    assert [d.weight for d in config.data.train] == [0.7, 0.3]
    assert config.optimizer.lr == 1e-3
    assert config.log.tensorboard is False


def test_a_preset_on_the_command_line_replaces_the_one_in_the_file():
    assert build({"model": {"preset": "llama2-7b"}}, "--model.preset", "tiny").model.hidden_size == 64


def test_unknown_keys_name_the_nearest_setting():
    text = message({"optimizer": {"learning_rate": 1}, "lr_shedule": {}})
    assert "lr_shedule: no such setting (did you mean 'lr_schedule'?)" in text
    assert "optimizer.learning_rate: no such setting" in text
    assert "batch.golbal: no such setting (did you mean 'global'?)" in message({}, "--batch.golbal", "4")
    assert "data.train.0.wieght: no such setting (did you mean 'weight'?)" in message(
        {"data": {"train": [{"path": "a", "wieght": 1}]}}
    )


def test_a_family_is_one_of_those_with_a_preset():
    known = "known: llama, mistral, ministral, "
    text = message({"model": {"preset": "tiny", "family": "mistrall"}})
    assert f"model.family = 'mistrall' is unknown (did you mean 'mistral'?); {known}" in text
    assert f"model.family = 'zzz' is unknown; {known}" in message({}, "--model.family", "zzz")
    assert "model.family = 5: input should be a valid string" in message({}, "--model.family", "5")


def test_all_problems_are_reported_at_once():
    text = message({"batch": {"global": "many"}, "train": {"steps": -1}, "nonsense": {}, "model": {"preset": "tinny"}})
    for part in ("batch.global = 'many'", "train.steps = -1", "nonsense", "'tinny' is unknown (did you mean 'tiny'?)"):
        assert part in text
    assert "problems in test.yaml" in text


def test_tp_and_pp_are_numbers_or_auto():
    parallel = build({"parallel": {"tp": "auto"}}, "--parallel.pp", "4").parallel
    assert (parallel.tp, parallel.pp) == ("auto", 4)
    text = message({"parallel": {"tp": "some", "pp": 0}})
    assert text.splitlines()[1:] == [
        "  parallel.tp = 'some': expected a number of at least 1, or auto",
        "  parallel.pp = 0: expected a number of at least 1, or auto",
    ]


def test_arguments_that_are_not_overrides():
    assert "unexpected argument 'oops'; overrides look like --section.key VALUE, with quotes around spaces" in message(
        {}, "oops"
    )
    assert "--train.steps needs a value" in message({}, "--train.steps")
    assert "--train.steps needs a value" in message({}, "--train.steps", "--log.interval", "1")
    assert "not valid YAML" in message({}, "--train.steps", "[1")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("a/b", "data.train = 'a/b': expected a list of sections; as in --data.train '[{path: a/b}]'"),
        (
            "[a/b]",
            "data.train.0 = 'a/b': a section, not a setting; its settings are path, weight; "
            "as in --data.train '[{path: a/b}]'",
        ),
    ],
)
def test_datasets_given_by_their_paths_alone(typed, said):
    assert f"\n  {said}" in message({}, "--data.train", typed)


def test_the_resolved_yaml_loads_to_an_equal_config(tmp_path):
    config = build({"model": {"preset": "tiny-llama3"}}, "--run.dir", "runs/x")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(path, presets=PRESETS) == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", r'not valid YAML: (?s:.)*in ".*bad.yaml", line 1'),
        ("# a", "bad.yaml is empty"),
        ("- 1", "expected a mapping"),
        ("!!python/object:os.system x", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load(path, presets=PRESETS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file at"):
        load(tmp_path / "none.yaml", presets=PRESETS)


def test_the_schema_covers_every_section():
    schema = Config.model_json_schema(by_alias=True)
    assert set(schema["properties"]) == set(yaml.safe_load(build().to_yaml()))


TRAINED = {**PRESETS["tiny"], "hidden_size": 48}


def test_a_trained_model_fills_the_fields_and_names_its_tokenizer():
    asked = []

    def trained(kind, path):
        asked.append((kind, str(path)))
        if path.name == "none":
            raise CheckpointError("no such model directory")
        return TRAINED, "their/tokenizer"

    def build_from(model, *overrides):
        raw = {**MINIMAL, "model": model, "data": {key: MINIMAL["data"][key] for key in ("train", "seq_length")}}
        return resolve(raw, overrides, presets=PRESETS, source="test.yaml", trained=trained)

    config = build_from({"from_hf": "a/b", "init_std": 0.5})
    assert (config.model.hidden_size, config.model.init_std, config.data.tokenizer) == (48, 0.5, "their/tokenizer")
    assert build_from({"from_hf": "a"}, "--data.tokenizer", "byte").data.tokenizer == "byte"
    assert build_from({"preset": "llama2-7b"}, "--model.from_checkpoint", "c").model.hidden_size == 48
    assert asked == [("from_hf", "a/b"), ("from_hf", "a"), ("from_checkpoint", "c")]
    with pytest.raises(ConfigError, match=r"^1 problem in .*\n  model\.from_hf = none: no such model directory$"):
        build_from({"from_hf": "none"})  # and not: data.tokenizer is missing

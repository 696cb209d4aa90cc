"""The recipes of examples/configs/: found by name, and as large as their comments say."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.cli.check import check_run
from engine.config.load import load
from engine.config.recipes import find_config, recipes
from engine.errors import ConfigError, OutOfMemoryError
from engine.model.families import PRESETS

SMALL = {  # of config.json of the models on the Hub
    "Llama-3.2-3B": PRESETS["llama3.1-8b"] | {"num_layers": 28, "hidden_size": 3072, "intermediate_size": 8192,
        "num_heads": 24, "tie_embeddings": True},
    "Qwen2.5-3B": PRESETS["qwen2.5-7b"] | {"num_layers": 36, "hidden_size": 2048, "intermediate_size": 11008,
        "num_heads": 16, "num_kv_heads": 2, "vocab_size": 151936, "max_position": 32768, "tie_embeddings": True},
    "Qwen3-4B": PRESETS["qwen3-8b"] | {"hidden_size": 2560, "intermediate_size": 9728, "tie_embeddings": True},
}  # fmt: skip
MEMORY_GIB = {"H100": (79.0, 80.0), "H200": (139.8,)}  # CUDA shows 79.1 to 79.6 GiB of an H100
ROW = re.compile(r"#   +(?P<what>\S+) +(?P<where>\d × \d|H\d00 \d+ GB) +(?P<gib>[\d.]+)(?P<overrides>  --.*)?")


class Row(NamedTuple):
    """A line of the table in a recipe's comment."""

    recipe: str
    model: str  # a preset, or a key of SMALL
    ranks: int
    gpu: str
    layout: str
    gib: str
    overrides: list[str]


def rows() -> list[Row]:
    found = []
    for recipe, path in recipes().items():
        for match in filter(None, map(ROW.fullmatch, path.read_text(encoding="utf-8").splitlines())):
            what, where, gib, overrides = match.groups()
            ranks = int(what) if what.isdigit() else 1 if where.startswith("H") else 8
            gpu, layout = (where[:4], "1 × 1") if where.startswith("H") else ("H100", where)
            found.append(
                Row(recipe, recipe if what.isdigit() else what, ranks, gpu, layout, gib, (overrides or "").split())
            )
    return found


def test_every_recipe_loads_by_its_name():
    assert {"llama2-7b", "sft-llama2-7b", "sft-one-gpu", "tiny"} <= set(recipes())
    for name in recipes():
        trained = lambda kind, path: (PRESETS["tiny"], "byte")  # noqa: E731
        load(name, presets=PRESETS, trained=trained)


def test_the_first_line_of_a_recipe_is_a_sentence():
    """`triaxis config` lists it."""
    for path in recipes().values():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and first.endswith("."), path


def test_every_preset_has_a_recipe_for_8_64_and_512_gpus_and_is_in_those_of_fine_tuning():
    """On one GPU, all that fit."""
    presets = {name for name in PRESETS if not name.startswith("tiny")}
    sizes = {(row.recipe, row.ranks) for row in rows()}
    assert {(name, ranks) for name in presets for ranks in (8, 64, 512)} <= sizes
    assert {row.model for row in rows() if row.recipe == "sft-llama2-7b"} == presets
    for name in presets - {row.model for row in rows() if row.recipe == "sft-one-gpu"}:
        config = load("sft-one-gpu", presets=PRESETS, trained=lambda kind, path, name=name: (PRESETS[name], "byte"))
        with pytest.raises(OutOfMemoryError):
            check_run(config, 1, 1, *MEMORY_GIB["H200"])


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.recipe}-{row.model}-{row.ranks}-{row.gpu}")
def test_a_recipe_fits_as_its_comment_says_and_nothing_better_is_recommended(row, capsys):
    model = PRESETS.get(row.model) or SMALL[row.model]
    config = load(
        row.recipe, row.overrides, presets=PRESETS, trained=lambda kind, path: (model, f"{path}/tokenizer.json")
    )
    for memory_gib in MEMORY_GIB[row.gpu]:
        check_run(config, min(row.ranks, 8), max(row.ranks // 8, 1), memory_gib)
        printed = capsys.readouterr().out
        tp, pp = row.layout.split(" × ")
        assert f"= tp {tp} × pp {pp} × dp " in printed
        assert (
            f"the smallest tp × pp whose fullest rank, {row.gib} GiB, fits in 90% of {memory_gib:.1f} GiB"
            in " ".join(printed.split())
        )
        assert "recommended:" not in printed
        assert printed.splitlines()[-1].endswith("ok")
    if row.recipe == row.model:
        assert config.batch.global_ * config.data.seq_length == 4 * 2**20  # tokens per step


def test_seven_billion_parameters_do_not_fit_on_one_gpu_of_80_gb_whatever_is_set():
    for name in ("llama2-7b", "starcoder2-7b"):
        most = ["--parallel.recompute", "full", "--optimizer.moments", "bf16", "--data.seq_length", "256"]
        config = load(
            "sft-one-gpu", most, presets=PRESETS, trained=lambda kind, path, name=name: (PRESETS[name], "byte")
        )
        with pytest.raises(OutOfMemoryError, match=r"a GPU has 80\.0 GiB"):
            check_run(config, 1, 1, 80)


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
        ("pretrain.yml", r"^no configuration file at pretrain.yml \(did you mean 'pretrain.yaml'\?\)$"),
        ("runs", "^runs is a directory; expected a configuration file$"),
        ("runs/mine", "^runs/mine is a directory; expected a configuration file, as runs/mine/config.yaml$"),
    ],
)
def test_what_is_neither_is_named(name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("pretrain.yaml", "runs/mine/config.yaml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    with pytest.raises(ConfigError, match=problem):
        find_config(name)

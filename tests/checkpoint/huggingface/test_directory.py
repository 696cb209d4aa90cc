import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.errors import CheckpointError
from engine.model.parameters import logical_shapes
from tests.checkpoint.huggingface.directory_cases import TINY, edit_weights, export_, import_, tiny_checkpoint


def test_rotary_constants_of_old_exports_are_ignored_and_said(tmp_path: Path) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    edit_weights(hf, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    (hf / "training_args.bin").write_bytes(b"never opened")
    assert HuggingFaceDirectory(hf).ignored == [
        "training_args.bin",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    assert import_(hf, tmp_path / "imported").tensors("param") == logical_shapes(TINY)


class Bomb:
    """A pickle that creates a file when somebody opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def use_pickle(hf: Path) -> None:
    torch.save(Bomb(hf.parent / "boom"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()


def disguise_pickle(hf: Path) -> None:
    torch.save(Bomb(hf.parent / "boom"), hf / "x")
    (hf / "x").rename(hf / "model.safetensors")


def index(hf: Path, weight_map: Any) -> None:
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def outside(hf: Path, name: str) -> None:
    shutil.copy(hf / "model.safetensors", hf.parent / "outside.safetensors")
    index(hf, dict.fromkeys(logical_shapes(TINY), name))


def link_outside(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf.parent / "outside.safetensors")
    (hf / "model.safetensors").symlink_to(hf.parent / "outside.safetensors")


def set_config(hf: Path, **changes: Any) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))


def make_pipe(hf: Path, name: str) -> None:
    (hf / name).unlink()
    os.mkfifo(hf / name)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("blob"))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (use_pickle, r"pytorch_model\.bin may run code"),
    "pickle with a false name": (disguise_pickle, r"model\.safetensors is damaged"),
    "code": (
        lambda hf: (hf / "modeling_evil.py").write_text("print('boom')"),
        r"modeling_evil\.py.*directories with code are rejected",
    ),
    "auto_map": (lambda hf: set_config(hf, auto_map={"AutoConfig": "evil.Config"}), "auto_map"),
    "unknown architecture": (lambda hf: set_config(hf, architectures=["EvilForCausalLM"]), "EvilForCausalLM"),
    "no architecture": (lambda hf: set_config(hf, architectures=None), "architectures = None"),
    "a billion layers": (lambda hf: set_config(hf, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "a trillion layers with windows": (
        lambda hf: set_config(hf, architectures=["MistralForCausalLM"], model_type="mistral", num_hidden_layers=10**12),
        "num_hidden_layers = 1000000000000",
    ),
    "huge hidden size": (lambda hf: set_config(hf, hidden_size=2**60), r"are not those of its config\.json"),
    "negative epsilon": (lambda hf: set_config(hf, rms_norm_eps=-1.0), r"config\.json: norm_eps = -1\.0"),
    "words for numbers": (lambda hf: set_config(hf, rope_theta="big"), r"config\.json: rope_theta = 'big'"),
    "config is a list": (lambda hf: (hf / "config.json").write_text("[]"), r"config\.json holds a list"),
    "config is a bomb": (lambda hf: (hf / "config.json").write_text("[" * 10**6), r"config\.json is not JSON"),
    "config is binary": (lambda hf: (hf / "config.json").write_bytes(b"\xff\xfe\0"), r"config\.json is not JSON"),
    "config is a pipe": (lambda hf: make_pipe(hf, "config.json"), r"config\.json is not a regular file"),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"config\.json is missing"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "index upwards": (lambda hf: outside(hf, "../outside.safetensors"), "leads out of the directory"),
    "index absolute": (lambda hf: outside(hf, str(hf.parent / "outside.safetensors")), "leads out of the directory"),
    "index dots": (lambda hf: outside(hf, ".."), "leads out of the directory"),
    "index with a zero": (lambda hf: index(hf, {"a": "x\0y"}), "leads out of the directory"),
    "index too long": (lambda hf: index(hf, {"a": "x" * 5000}), "File name too long"),
    "index into a folder": (lambda hf: index(hf, {"a": "sub/model.safetensors"}), "leads out of the directory"),
    "link outside": (link_outside, "leads out of the directory"),
    "index of nothing": (lambda hf: index(hf, None), "weight_map is missing"),
    "index of numbers": (lambda hf: index(hf, {"a": 1}), "weight_map is missing or not a table"),
    "index to a missing file": (lambda hf: index(hf, {"a": "gone.safetensors"}), r"gone\.safetensors is missing"),
    "index lacks names": (
        lambda hf: index(hf, {"model.norm.weight": "model.safetensors"}),
        "is in the file, but not the index",
    ),
    "index names too many": (
        lambda hf: index(hf, dict.fromkeys([*logical_shapes(TINY), "a.b"], "model.safetensors")),
        "a.b is in the index, but not the file",
    ),
    "weights are a pipe": (lambda hf: make_pipe(hf, "model.safetensors"), "not a regular file"),
    "weights end early": (lambda hf: os.truncate(hf / "model.safetensors", 5000), r"model\.safetensors is damaged"),
    "half a download": (lambda hf: dangle(hf / "model.safetensors"), "is missing .*the download is incomplete"),
    "a pointer for weights": (
        lambda hf: (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "pointer of Git LFS",
    ),
    "integers for weights": (
        lambda hf: edit_weights(hf, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "model.norm.weight has dtype I8",
    ),
    "a tokenizer outside": (lambda hf: (hf / "tokenizer.json").symlink_to("/etc/passwd"), "leads out of the directory"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("good")
    return export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_directories_are_refused_with_the_reason(name: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "hf")
    change, expected = HOSTILE[name]
    change(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=expected):
        import_(tmp_path / "hf", tmp_path / "imported")
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "imported").exists()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such model directory: .*misspelt"):
        HuggingFaceDirectory(tmp_path / "misspelt")


def snapshot(repository: Path, hf: Path) -> Path:
    """A directory as the Hub's cache has it."""
    path = repository / "snapshots" / "0123abcd"
    path.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(hf.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{i:064x}")
        (path / file.name).symlink_to(f"../../blobs/{i:064x}")
    return path


def test_a_snapshot_of_the_hubs_cache(good: Path, tmp_path: Path) -> None:
    mine, other = snapshot(tmp_path / "models--me--mine", good), snapshot(tmp_path / "models--me--other", good)
    assert import_(mine, tmp_path / "imported").model == TINY
    for target in (other / "config.json", good / "config.json", "../../refs", "/etc/passwd"):
        (mine / "config.json").unlink()
        (mine / "config.json").symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out of the directory"):
            HuggingFaceDirectory(mine)

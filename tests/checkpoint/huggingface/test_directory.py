import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from engine.checkpoint.huggingface import directory as huggingface
from engine.checkpoint.huggingface.directory import (
    HuggingFaceDirectory,
    export,
    import_directory,
    new_directory,
    plan_shards,
)
from engine.checkpoint.initial import InitialWeights
from engine.checkpoint.manager import Checkpoint, Piece, find
from engine.checkpoint.rectangles import Rectangle
from engine.checkpoint.storage import SafetensorsFile
from engine.config.schema import ModelConfig
from engine.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from engine.errors import CheckpointError, ConfigError, StorageError
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from tests.checkpoint.checkpoint_cases import save_step

TINY = ModelConfig(**{**PRESETS["tiny"], "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8})
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "starcoder2": ("starcoder2", {"sliding_window": 16}),
}


def import_(source: Path, run_dir: Path) -> Checkpoint:
    directory = HuggingFaceDirectory(source)
    return Checkpoint(import_directory(directory, run_dir, logical_shapes(directory.model)))


def export_(checkpoint: Checkpoint, out: Path, **settings: Any) -> Path:
    return export(checkpoint, None, out, logical_shapes(checkpoint.model_config()), **settings)


@pytest.mark.parametrize("name", MODELS)
def test_a_transformers_model_survives_the_way_there_and_back(name: str, tmp_path: Path) -> None:
    """Bitwise; and what we export gives the same logits."""
    transformers = pytest.importorskip("transformers")
    family, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **{**SIZES, **settings})
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()

    checkpoint = import_(tmp_path / "hf", tmp_path / "run")
    assert checkpoint.tokenizer_spec is None
    export_(checkpoint, tmp_path / "out", dtype=torch.float32, shard_bytes=50_000)
    assert not any("lm_head" in key for key in checkpoint.tensors("param")) or "tied" not in name

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    tokens = torch.randint(0, 300, (2, 40))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def tiny_checkpoint(run_dir: Path, model: ModelConfig = TINY, tokenizer: str | None = None) -> Checkpoint:
    """Random weights of `model`, as a training run would leave them."""
    generator = torch.Generator().manual_seed(0)

    def owned(seed: int, rank: int, world_size: int) -> list[Piece]:
        return [
            Piece(kind, name, shape, Rectangle((0,) * len(shape), shape), torch.randn(shape, generator=generator))
            for kind in ("param", "exp_avg", "exp_avg_sq")
            for name, shape in logical_shapes(model).items()
        ]

    sections: dict[str, Any] = {"model": model.model_dump(mode="json"), "data": {"tokenizer": tokenizer}}
    (result,) = save_step(run_dir, 5, owned=owned, config_yaml=json.dumps(sections))
    assert isinstance(result, Path), result
    return Checkpoint(result)


def test_bf16_export_of_a_trained_checkpoint(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    seen: list[tuple[str, int]] = []
    out = export_(checkpoint, tmp_path / "out", progress=lambda name, count: seen.append((name, count)))
    assert sorted(os.listdir(out)) == ["config.json", "generation_config.json", "model.safetensors"]
    loaded = safetensors.torch.load_file(out / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == logical_shapes(TINY)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, checkpoint.read("param", name).bfloat16())
    assert [name for name, _ in seen] == list(logical_shapes(TINY))
    assert sum(count for _, count in seen) == sum(tensor.numel() for tensor in loaded.values())
    assert not (tmp_path / "out.partial").exists()


def test_the_index_lists_every_tensor_and_the_total(tmp_path: Path) -> None:
    out = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    found = {name: file for file in files for name in safetensors.torch.load_file(out / file)}
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(2 * torch.Size(s).numel() for s in logical_shapes(TINY).values())


def test_plan_shards() -> None:
    assert plan_shards({"a": 3, "b": 3}, 6) == {"model.safetensors": ["a", "b"]}
    assert plan_shards({"a": 3, "b": 4, "c": 9, "d": 1}, 6) == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["b"],
        "model-00003-of-00004.safetensors": ["c"],
        "model-00004-of-00004.safetensors": ["d"],
    }


def test_an_import_holds_fp32_masters_alone_and_says_what_it_is(tmp_path: Path) -> None:
    export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    checkpoint = import_(tmp_path / "hf", tmp_path / "imported")
    assert set(checkpoint.manifest.tensors) == {"param"}
    assert (checkpoint.state.step, checkpoint.state.consumed_samples, checkpoint.state.data_fingerprint) == (0, 0, "")
    assert checkpoint.model_config() == TINY
    assert all(tensor.dtype == "F32" for tensor in checkpoint.manifest.tensors["param"].values())
    found = find(tmp_path / "imported")
    assert found and found.path == checkpoint.path == tmp_path / "imported" / "checkpoints" / "step_00000000"
    assert not (tmp_path / "imported.partial").exists()


def test_rotary_constants_of_old_exports_are_ignored_and_said(tmp_path: Path) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    edit_weights(hf, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    (hf / "training_args.bin").write_bytes(b"never opened")
    assert HuggingFaceDirectory(hf).ignored == [
        "training_args.bin",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    assert import_(hf, tmp_path / "imported").tensors("param") == logical_shapes(TINY)


def edit_weights(hf: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, hf / "model.safetensors")


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.ones(2)
        tensors["lm_head.weight"] = torch.ones(3, 32)

    edit_weights(hf, change)
    with pytest.raises(CheckpointError) as error:
        import_(hf, tmp_path / "imported")
    assert "model.norm.weight: missing, expected shape [32]" in str(error.value)
    assert "model.extra.weight: unexpected" in str(error.value)
    assert "lm_head.weight: shape [3, 32], expected [257, 32]" in str(error.value)
    assert not (tmp_path / "imported").exists()


def test_a_head_stored_beside_tied_embeddings_is_unexpected(tmp_path: Path) -> None:
    model = TINY.model_copy(update={"tie_embeddings": True})
    hf = export_(tiny_checkpoint(tmp_path / "run", model), tmp_path / "hf")
    edit_weights(hf, lambda tensors: tensors.update({"lm_head.weight": torch.ones(257, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: unexpected"):
        import_(hf, tmp_path / "imported")


def test_an_existing_directory_is_never_touched(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    (tmp_path / "empty").mkdir()
    assert (export_(checkpoint, tmp_path / "empty") / "config.json").exists()


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"), new_directory(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_begun_is_removed_when_it_fails(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left by a killed conversion").touch()
    with pytest.raises(type(error)), new_directory(tmp_path / "out") as partial:
        assert os.listdir(partial) == []
        (partial / "half").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_export_that_does_not_read_back_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    real = huggingface._write_weights

    def write_and_flip(files: Any, partial: Path, *rest: Any) -> Any:
        written = real(files, partial, *rest)
        content = bytearray((partial / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (partial / "model.safetensors").write_bytes(content)
        return written

    monkeypatch.setattr(huggingface, "_write_weights", write_and_flip)
    with pytest.raises(CheckpointError, match="does not read back"):
        export_(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_checkpoint_of_another_model_is_not_exported(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another model"):
        export(checkpoint, None, tmp_path / "out", logical_shapes(ModelConfig(**PRESETS["tiny"])))


def test_the_byte_tokenizer_is_exported_and_comes_back(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run", tokenizer="byte")
    assert checkpoint.tokenizer_spec == "byte"
    hf = export(checkpoint, ByteTokenizer(), tmp_path / "hf", logical_shapes(TINY))
    assert json.loads((hf / "generation_config.json").read_text()) == {"eos_token_id": 256}
    assert json.loads((hf / "config.json").read_text())["eos_token_id"] == 256
    imported = import_(hf, tmp_path / "imported")
    assert imported.tokenizer_spec is not None
    assert load_tokenizer(imported.tokenizer_spec).encode("aé") == ByteTokenizer().encode("aé")


def test_tokenizer_files_made_for_transformers_pass_through_unchanged(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run", tokenizer="byte")
    hf = export(checkpoint, ByteTokenizer(), tmp_path / "hf", logical_shapes(TINY))
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    imported = import_(hf, tmp_path / "imported")
    assert imported.tokenizer_spec
    again = export(imported, load_tokenizer(imported.tokenizer_spec), tmp_path / "again", logical_shapes(TINY))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (again / name).read_bytes() == (hf / name).read_bytes()


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


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (use_pickle, r"pytorch_model\.bin may run code"),
    "pickle with a false name": (disguise_pickle, r"model\.safetensors is damaged"),
    "code": (lambda hf: (hf / "modeling_evil.py").write_text("print('boom')"), r"modeling_evil\.py.*own code"),
    "auto_map": (lambda hf: set_config(hf, auto_map={"AutoConfig": "evil.Config"}), "auto_map"),
    "unknown architecture": (lambda hf: set_config(hf, architectures=["EvilForCausalLM"]), "EvilForCausalLM"),
    "no architecture": (lambda hf: set_config(hf, architectures=None), "architectures = None"),
    "a billion layers": (lambda hf: set_config(hf, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
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


def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors alive at one time, both ways."""
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    alive, most = [0], [0]
    real = SafetensorsFile.tensor

    def counted(file: SafetensorsFile, name: str, rectangle: Rectangle | None = None) -> torch.Tensor:
        tensor = real(file, name, rectangle)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "tensor", counted)
    export_(import_(hf, tmp_path / "imported"), tmp_path / "out")
    assert most[0] <= 2  # the next one is read while the name of the last still stands


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({"top_k": 5}, {"top_k": 5, "eos_token_id": [256, 257]}),
        ({"eos_token_id": 256}, {"eos_token_id": [256, 257]}),
        ({"eos_token_id": [7]}, {"eos_token_id": [7, 257]}),
    ],
)
def test_the_end_of_turn_of_a_chat_template_ends_generation(tmp_path: Path, before: Any, expected: Any) -> None:
    hf = export(
        tiny_checkpoint(tmp_path / "run", tokenizer="byte"), ByteTokenizer(), tmp_path / "hf", logical_shapes(TINY)
    )
    settings = json.loads((hf / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 257, "content": "<end>"})
    (hf / "tokenizer.json").write_text(json.dumps(settings))
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    (hf / "chat_template.jinja").write_text(template)
    (hf / "generation_config.json").write_text(json.dumps(before))
    imported = import_(hf, tmp_path / "imported")
    assert imported.tokenizer_spec
    again = export(imported, load_tokenizer(imported.tokenizer_spec), tmp_path / "again", logical_shapes(TINY))
    assert (again / "chat_template.jinja").read_text() == template
    assert json.loads((again / "generation_config.json").read_text()) == expected


def test_a_chat_template_beside_the_byte_tokenizer_comes_along(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "byte" and [file.name for file in tokenizer.files] == ["chat_template.jinja"]
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="a directory without one"):
        load_tokenizer(tmp_path / "other")


def test_a_model_is_read_by_the_rectangles_that_a_rank_holds(tmp_path: Path) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    for kind, path in (("from_hf", hf), ("from_checkpoint", tmp_path / "run")):
        weights = InitialWeights(kind, path)
        whole = HuggingFaceDirectory(hf).read("model.layers.0.mlp.up_proj.weight")
        part = weights.read("model.layers.0.mlp.up_proj.weight", Rectangle((3, 5), (10, 7)))
        torch.testing.assert_close(part.to(whole.dtype), whole[3:13, 5:12], rtol=0, atol=0)
        assert weights.model.hidden_size == TINY.hidden_size

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from engine.checkpoint import reader
from engine.checkpoint.huggingface import directory, exporting
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.config.schema import ModelConfig
from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from engine.parallel.table import Rectangle
from tests.checkpoint.huggingface.directory_cases import TINY, edit_weights, export_, import_, tiny_checkpoint

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SOME_WINDOWS = ["full_attention", "sliding_attention"]
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1] * 6, "long_factor": [2] * 6},
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "llama with biases of attention": ("llama", {"attention_bias": True}),
    "llama with biases of the feed-forward": ("llama", {"mlp_bias": True}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "ministral": ("ministral", {"layer_types": SOME_WINDOWS, "sliding_window": 16, "head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": 16, "pad_token_id": None}),
    "phi3, longrope": ("phi3", LONGROPE),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "starcoder2": ("starcoder2", {"sliding_window": 16}),
    "olmo2": ("olmo2", {"pad_token_id": None}),
    "gemma2": ("gemma2", {"sliding_window": 16, "head_dim": 32, "query_pre_attn_scalar": 144, "pad_token_id": None}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "head_dim": 32, "pad_token_id": None}),
    "granite": ("granite", {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 3.0}),
}


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_export_of_a_trained_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    seen: list[tuple[str, int]] = []
    out = export_(checkpoint, tmp_path / "out", dtype=dtype, progress=lambda name, count: seen.append((name, count)))
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    loaded = safetensors.torch.load_file(out / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == logical_shapes(TINY)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, checkpoint.read(name).to(dtype))
    assert [name for name, _ in seen] == list(logical_shapes(TINY))
    assert sum(count for _, count in seen) == sum(tensor.numel() for tensor in loaded.values())
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("value", [1e5, -1e5])
def test_a_weight_too_large_for_fp16_is_named(tmp_path: Path, value: float) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "first"), tmp_path / "hf")
    edit_weights(hf, lambda weights: weights["model.norm.weight"][:1].fill_(value))
    run = import_(hf, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight has values beyond 65504.* --dtype bf16$"):
        export_(run, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    export_(run, tmp_path / "out", dtype=torch.bfloat16)


def test_the_index_lists_every_tensor_and_the_total(tmp_path: Path) -> None:
    out = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    found = {name: file for file in files for name in safetensors.torch.load_file(out / file)}
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(2 * torch.Size(s).numel() for s in logical_shapes(TINY).values())


def test_an_existing_directory_is_never_touched(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    (tmp_path / "empty").mkdir()
    assert (export_(checkpoint, tmp_path / "empty") / "config.json").exists()


def test_an_export_that_does_not_read_back_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "run")
    real = exporting._write_weights

    def write_and_flip(files: Any, partial: Path, *rest: Any) -> Any:
        written = real(files, partial, *rest)
        content = bytearray((partial / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (partial / "model.safetensors").write_bytes(content)
        return written

    monkeypatch.setattr(exporting, "_write_weights", write_and_flip)
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


def test_memory_is_bounded_by_a_block_and_not_by_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements read and alive at one time, both ways."""
    for module in (reader, directory):
        monkeypatch.setattr(module, "ROW_BLOCK_BYTES", 1024)
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf", dtype=torch.float32)
    alive, most = [0], [0]
    real = SafetensorsFile.tensor

    def counted(file: SafetensorsFile, name: str, rectangle: Rectangle | None = None) -> torch.Tensor:
        tensor = real(file, name, rectangle)
        count = tensor.numel()
        alive[0] += count
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - count))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "tensor", counted)
    export_(import_(hf, tmp_path / "imported"), tmp_path / "out")
    assert most[0] * 4 <= 3 * 1024  # one is written and one is read while the name of the last still stands


def test_a_chat_template_beside_the_byte_tokenizer_comes_along(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "byte" and [file.name for file in tokenizer.files] == ["chat_template.jinja"]
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="a directory without one"):
        load_tokenizer(tmp_path / "other")

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.huggingface.directory import HuggingFaceDirectory, import_directory
from engine.checkpoint.load import load_decoder, stop_ids
from engine.checkpoint.storage import SafetensorsFile
from engine.config.schema import ModelConfig
from engine.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from engine.errors import CheckpointError
from engine.model.attention import attend_within
from engine.model.parameters import logical_shapes
from engine.parallel.collectives import gather_sequence
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import logical_state, new_decoder, new_parameters, tiny_config

MODEL = tiny_config(num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=259, init_std=0.1)
CPU = torch.device("cpu")
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<end>": 2}, "unk_token": "a"},
    "added_tokens": [
        {"id": 2, "content": "<end>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ],
}


def write_directory(path: Path, model: ModelConfig) -> Path:
    """A Hugging Face directory with a new model and a tokenizer of three words."""
    path.mkdir()
    config = hf_config(model, dtype=torch.float32, bos_id=None, eos_id=2)
    (path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(logical_state(model, new_parameters(model)), path / "model.safetensors")
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return path


def load_part(path: Path) -> tuple[torch.Tensor, int]:
    """This rank's share of the logits of a few tokens, and how many values it has read."""
    read: list[int] = []
    tensor = SafetensorsFile.tensor

    def counted(self: SafetensorsFile, *arguments: object) -> torch.Tensor:
        values = tensor(self, *arguments)
        read.append(values.numel())
        return values

    SafetensorsFile.tensor = counted  # type: ignore[method-assign]
    world = world_of(Layout(tp=int(os.environ["WORLD_SIZE"])))
    decoder, _ = load_decoder(path, torch.float32, CPU, world.tp)
    tokens = torch.arange(8)
    with torch.no_grad():
        hidden = gather_sequence(decoder(tokens, tokens, attend_within((0, 8), None)), world.tp_group)
        return decoder.logits(hidden), sum(read)


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / "hf", MODEL)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_loads_its_part_of_the_model(directory, tmp_path, ranks):
    source = HuggingFaceDirectory(directory)
    checkpoint = import_directory(source, tmp_path / "run", logical_shapes(MODEL))
    tokens = torch.arange(8)
    whole = new_decoder(MODEL)
    with torch.no_grad():
        expected = whole.logits(whole(tokens, tokens, attend_within((0, 8), None)))
    size = sum(parameter.numel() for parameter in new_parameters(MODEL).values())
    for path in (directory, checkpoint):
        parts = run_ranks(ranks, load_part, path)
        torch.testing.assert_close(torch.cat([part for part, _ in parts], 1), expected, rtol=1e-5, atol=1e-5)
        if path == directory:  # rows alone are read from a file; a checkpoint is verified rectangle by rectangle
            assert all(read < 0.9 * size for _, read in parts)


def test_a_model_that_so_many_ranks_cannot_share(directory):
    with pytest.raises(RuntimeError, match=r"3 ranks cannot share .* --nproc-per-node can be 1, 2, 4"):
        run_ranks(3, load_part, directory)


def test_what_ends_a_text(directory):
    tokenizer = load_tokenizer(directory)
    assert stop_ids(ByteTokenizer()) == {256}
    assert stop_ids(tokenizer) == {2}
    for content, ids in (({}, {2}), ({"eos_token_id": None}, {2}), ({"eos_token_id": 0}, {0, 2})):
        (directory / "generation_config.json").write_text(json.dumps(content))
        assert stop_ids(tokenizer) == ids
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert stop_ids(tokenizer) == {0, 1, 2}


NO_END_IDS = ('"x"', "[0, true]", "-1", "3", "1e999", "[[0]]")


@pytest.mark.parametrize("content", ["{", "[]", "3", *(f'{{"eos_token_id": {ids}}}' for ids in NO_END_IDS)])
def test_a_generation_config_that_makes_no_sense(directory, content):
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        stop_ids(load_tokenizer(directory))

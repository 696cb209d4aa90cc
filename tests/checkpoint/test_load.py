import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.importing import import_directory
from engine.checkpoint.load import load_decoder
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.config.schema import ModelConfig
from engine.model.attention import attend_within
from engine.model.parameters import logical_shapes
from engine.parallel.collectives import gather_sequence
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import logical_state, new_decoder, new_parameters, tiny_config
from tests.checkpoint.huggingface.directory_cases import write_word_tokenizer

MODEL = tiny_config(num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=259, init_std=0.1)
CPU = torch.device("cpu")


def write_directory(path: Path, model: ModelConfig) -> Path:
    """A Hugging Face directory with a new model and a tokenizer of three words."""
    path.mkdir()
    config = hf_config(model, dtype=torch.float32, bos_id=None, eos_id=2)
    (path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(logical_state(model, new_parameters(model)), path / "model.safetensors")
    return write_word_tokenizer(path)


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
        hidden = gather_sequence(decoder(tokens, tokens, attend_within((0, 8), MODEL)), world.tp_group)
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
        expected = whole.logits(whole(tokens, tokens, attend_within((0, 8), MODEL)))
    size = sum(parameter.numel() for parameter in new_parameters(MODEL).values())
    for path in (directory, checkpoint):
        parts = run_ranks(ranks, load_part, path)
        torch.testing.assert_close(torch.cat([part for part, _ in parts], 1), expected, rtol=1e-5, atol=1e-5)
        if path == directory:  # rows alone are read from a file; a checkpoint is verified rectangle by rectangle
            assert all(read < 0.9 * size for _, read in parts)


def test_a_model_that_so_many_ranks_cannot_share(directory):
    with pytest.raises(RuntimeError, match=r"cannot be sharded over 3 ranks: 3 .*--nproc-per-node\) can be 1, 2, 4"):
        run_ranks(3, load_part, directory)

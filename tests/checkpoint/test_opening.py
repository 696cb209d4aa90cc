from pathlib import Path

import torch

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.opening import initial_weights, open_model, trained
from engine.config.schema import ModelConfig
from engine.parallel.table import Rectangle
from tests.checkpoint.huggingface.directory_cases import TINY, export_, tiny_checkpoint


def test_a_model_is_read_by_the_rectangles_that_a_rank_holds(tmp_path: Path) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    for kind, path in (("from_hf", hf), ("from_checkpoint", tmp_path / "run")):
        weights = initial_weights(TINY.model_copy(update={kind: path}))
        assert weights is not None
        whole = HuggingFaceDirectory(hf).read("model.layers.0.mlp.up_proj.weight")
        part = weights.read("model.layers.0.mlp.up_proj.weight", Rectangle((3, 5), (10, 7)))
        torch.testing.assert_close(part.to(whole.dtype), whole[3:13, 5:12], rtol=0, atol=0)
        assert weights.model.hidden_size == TINY.hidden_size
        assert open_model(path).model == weights.model
        assert ModelConfig(**trained(kind, path)[0]) == weights.model
    assert initial_weights(TINY) is None

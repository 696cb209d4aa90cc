from pathlib import Path

import pytest
import torch

from engine.checkpoint.huggingface.directory import HEAD
from engine.checkpoint.run_directory import find
from engine.errors import CheckpointError
from tests.checkpoint.huggingface.directory_cases import TINY, edit_weights, export_, import_, tiny_checkpoint


def test_an_import_holds_fp32_masters_alone_and_says_what_it_is(tmp_path: Path) -> None:
    export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    checkpoint = import_(tmp_path / "hf", tmp_path / "imported")
    assert set(checkpoint.manifest.tensors) == {"param"}
    assert (checkpoint.state.step, checkpoint.state.consumed_samples, checkpoint.state.data_fingerprint) == (0, 0, "")
    assert checkpoint.model == TINY
    assert all(tensor.dtype == "F32" for tensor in checkpoint.manifest.tensors["param"].values())
    found = find(tmp_path / "imported")
    assert found and found.path == checkpoint.path == tmp_path / "imported" / "checkpoints" / "step_00000000"
    assert not (tmp_path / "imported.partial").exists()


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


def test_a_head_stored_beside_tied_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is left out if it is the embedding, to the last row, and refused otherwise."""
    monkeypatch.setattr("engine.checkpoint.huggingface.directory.ROWS", 100)
    model = TINY.model_copy(update={"tie_embeddings": True})
    hf = export_(tiny_checkpoint(tmp_path / "run", model), tmp_path / "hf")
    edit_weights(hf, lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()}))
    imported = import_(hf, tmp_path / "imported")
    assert HEAD not in imported.tensors("param")
    edit_weights(hf, lambda tensors: tensors[HEAD][256, 31].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* set tie_word_embeddings to false"):
        import_(hf, tmp_path / "other")
    edit_weights(hf, lambda tensors: tensors.update({HEAD: torch.ones(256, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: unexpected"):
        import_(hf, tmp_path / "other")


def test_fp64_weights_beyond_fp32(tmp_path: Path) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    name = "model.norm.weight"
    edit_weights(
        hf, lambda tensors: tensors.update({name: tensors[name].double().index_fill(0, torch.tensor(3), 1e39)})
    )
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: 1 value NaN or infinite in fp32"):
        import_(hf, tmp_path / "imported")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_weights_that_are_not_numbers(tmp_path: Path, name: str, value: float) -> None:
    hf = export_(tiny_checkpoint(tmp_path / "run"), tmp_path / "hf")
    edit_weights(hf, lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: 2 values NaN or infinite"):
        import_(hf, tmp_path / "imported")
    assert not list(tmp_path.glob("imported*"))

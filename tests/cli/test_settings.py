import re

import pytest

from engine.cli.settings import load_config
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from_hf", "a run of Triaxis, not a Hugging Face directory: --model.from_checkpoint runs/mine"),
        ("from_checkpoint", "no such checkpoint directory; name a model by --model.from_checkpoint or --model.from_hf"),
    ],
)
def test_a_model_that_is_not_there_or_of_another_kind(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    path = "runs/mine" if source == "from_hf" else "runs/none"
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=re.escape(f"model.{source} = {path}: {said}")):
        load_config("sft-tiny", [f"--model.{source}", path])

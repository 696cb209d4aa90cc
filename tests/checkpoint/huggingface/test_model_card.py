"""What a model card says, and that it does not say where the model was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.checkpoint.huggingface.model_card import MODEL_CARD, model_card
from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import Config
from engine.model.parameters import logical_shapes
from engine.testing.runs import run_config, run_training, write_conversations
from tests.checkpoint.huggingface.directory_cases import export_, import_


def card_of(run: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    """Metadata, rows of the tables, and text of a run's card."""
    checkpoint = open_checkpoint(run)
    text = model_card("mine", checkpoint, logical_shapes(checkpoint.model), torch.bfloat16)
    _, metadata, body = text.split("---\n", 2)
    cells = [line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ")]
    return yaml.safe_load(metadata), {cell[0]: cell[-1] for cell in cells}, text


def with_source(config: Config, source: Path) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"from_hf": source})})


def test_the_card_says_how_the_model_was_trained(workspace: Path) -> None:
    config = run_config(workspace, "--train.eval_steps", "2", "--log.interval", "1", steps=4)
    records = run_training(config, 2)
    metadata, rows, text = card_of(config.run.dir)
    assert metadata == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["triaxis"]}
    assert "Trained on text" in text and "from random weights" in text
    (last,) = [record for record in records if record["step"] == 4 and "loss" in record]
    (evaluated,) = [record for record in records if record["step"] == 4 and "eval_loss" in record]
    assert rows["training loss"] == f"{last['loss']:.4f} at step 4"
    assert rows["evaluation loss"] == f"{evaluated['eval_loss']:.4f} at step 4"
    assert rows["steps"] == "4 of 4" and rows["tokens"].startswith(f"{last['tokens']:,} tokens, {last['samples']}")
    assert rows["data"] == "`corpus` (weight 1)" and rows["tokenizer"] == "`byte`" and rows["precision"] == "fp32"
    assert rows["layout"] == "pp 1, dp 2, cp 1, tp 1"
    assert rows["architecture"] == "LlamaForCausalLM" and rows["weights"] == "bfloat16"
    assert (
        rows["parameters"] == f"{sum(map(torch.Size.numel, map(torch.Size, logical_shapes(config.model).values()))):,}"
    )
    assert str(workspace) not in text and "/" not in "".join(rows.values())


def test_the_card_of_an_early_checkpoint_has_its_own_losses(workspace: Path) -> None:
    config = run_config(workspace, "--log.interval", "1", "--checkpoint.interval", "2", steps=4)
    records = run_training(config, 1)
    _, rows, _ = card_of(config.run.dir / "checkpoints" / "step_00000002")
    assert rows["training loss"] == f"{records[1]['loss']:.4f} at step 2" and rows["steps"] == "2 of 4"
    with (config.run.dir / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": "4", "loss": 9.5}\n{"step": 2, "loss": null}\n{"step": 2, "lo')
    assert card_of(config.run.dir / "checkpoints" / "step_00000002")[1] == rows
    (config.run.dir / "metrics.jsonl").unlink()
    assert "training loss" not in card_of(config.run.dir)[1]


@pytest.mark.parametrize(
    ("directory", "name", "base"),
    [
        ("models/Llama-2-7b-hf", "`Llama-2-7b-hf`", None),
        (
            "hub/models--meta-llama--Llama-2-7b-hf/snapshots/01c7",
            "`meta-llama/Llama-2-7b-hf`",
            "meta-llama/Llama-2-7b-hf",
        ),
        ("a|b`\n\u202e", "`a_b___`", None),
    ],
)
def test_the_card_names_the_model_that_training_started_from(
    workspace: Path, directory: str, name: str, base: str | None
) -> None:
    write_conversations(workspace / "corpus")
    config = run_config(workspace, "--task", "sft", "--data.seq_length", "32", "--data.split", "[1, 0, 0]", steps=1)
    run_training(config, 1)
    stored = config.run.dir / "checkpoints" / "step_00000001" / "config.yaml"
    with_path = with_source(config, workspace / directory)
    checkpoint = open_checkpoint(config.run.dir)
    stored.write_text(with_path.to_yaml())
    text = model_card("a\nb", checkpoint, logical_shapes(config.model), torch.float32)
    assert f"Fine-tuned on conversations with Triaxis 0.1.0, starting from {name}." in text
    assert yaml.safe_load(text.split("---\n")[1]).get("base_model") == base
    assert "# a_b\n" in text and "target tokens" in text and str(workspace) not in text


def test_the_card_of_an_import_says_that_it_is_one(workspace: Path) -> None:
    config = run_config(workspace, steps=1)
    run_training(config, 1)
    hf = export_(open_checkpoint(config.run.dir), workspace / "The-Model")
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(hf / MODEL_CARD)
    assert card.data.library_name == "transformers" and card.data.license is None
    assert "# The-Model\n" in card.content and str(workspace) not in card.content
    again = export_(import_(hf, workspace / "imported"), workspace / "again")
    text = (again / MODEL_CARD).read_text()
    assert "from `The-Model`, without training." in text and "| training" not in text
    assert json.loads((again / "config.json").read_text())["model_type"] == "llama"

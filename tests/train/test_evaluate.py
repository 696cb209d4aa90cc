"""Evaluation reads its batches as training does."""

import pytest
import torch

from engine.parallel.layout import Layout, World
from engine.testing.runs import run_config
from engine.train import trainer
from engine.train.run import train


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What the data loader has been asked for, call by call."""
    calls, batches = [], trainer.batches
    monkeypatch.setattr(trainer, "batches", lambda data, **options: calls.append(options) or batches(data, **options))
    return calls


@pytest.mark.parametrize(("device", "pins"), [("cpu", False), ("cuda:0", True)])
def test_batches_for_a_gpu_are_pinned(tmp_path, monkeypatch, device, pins):
    monkeypatch.setattr(trainer, "batches", lambda data, **options: options["pin_memory"])
    world = World(Layout(), 0, 0, 1, torch.device(device))
    assert trainer.global_batches(None, run_config(tmp_path), world, first_sample=0, steps=1, num_workers=0) is pins


def test_evaluation_reads_as_training_does(workspace, asked):
    train(run_config(workspace, "--train.eval_steps", "2", "--data.num_workers", "1", steps=3))
    read = [(options["first_sample"], options["num_samples"], options["num_workers"]) for options in asked]
    size = run_config(workspace).batch.global_
    assert sorted(set(read)) == [(0, 2 * size, 0), (0, 3 * size, 1)]
    assert all(options["pin_memory"] is False for options in asked)

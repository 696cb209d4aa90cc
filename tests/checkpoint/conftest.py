"""A saved run for the tests of this folder."""

import os
from pathlib import Path

import pytest

from tests.checkpoint.checkpoint_cases import save_step


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts instead of waiting for the disk: no test here pulls the plug."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 1 and 2, saved by two ranks."""
    tokenizer = tmp_path / "tok.model"
    tokenizer.write_bytes(b"pieces")
    for step in (1, 2):
        for result in save_step(tmp_path / "run", step, world_size=2, tokenizer_files=[tokenizer]):
            assert isinstance(result, Path), result
    return tmp_path / "run"

"""`triaxis checkpoints`: what it lists, finds damaged and removes."""

from contextlib import closing
from pathlib import Path

import pytest

from engine.cli.checkpoints import main
from engine.errors import CheckpointError, ConfigError
from engine.testing.runs import run_config, run_training
from engine.train.log import RunLog


@pytest.fixture
def run(workspace):
    """A run with checkpoints of steps 2, 4, 6 and 8, of which the one of step 2 has the lowest evaluation loss."""
    every = ("--checkpoint.interval", "2", "--checkpoint.keep_last", "9", "--checkpoint.keep_best", "true")
    evaluation = ("--train.eval_interval", "2", "--train.eval_steps", "2")
    run_training(run_config(workspace, *every, *evaluation, steps=2))
    run_training(run_config(workspace, *every, *evaluation, "--optimizer.lr", "1.0", steps=8))  # it diverges
    return workspace / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def step(number: int) -> str:
    return f"step_{number:08d}"


def test_it_lists_verifies_and_prunes(run, capsys):
    main([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [step(number) for number in (2, 4, 6, 8)]
    assert " GB  2" in lines[0] and " 256 tokens" in lines[0] and "best, evaluation loss " in lines[0]
    assert lines[3].endswith("tokens  newest")
    main([str(run), "--verify"])
    assert "verified: 4 checkpoints, " in capsys.readouterr().out
    main([str(run), "--keep-last", "1"])
    assert f"removed: {step(4)}, {step(6)}\n" in capsys.readouterr().out
    assert names(run) == [step(2), step(8)]


def test_a_damaged_checkpoint_is_named_and_nothing_is_removed(run, capsys):
    shard = next((run / "checkpoints" / step(4)).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    main([str(run)])  # a byte is only found by reading
    with pytest.raises(CheckpointError, match=rf"^1 problem in .*\n  {shard} is damaged: its checksum"):
        main([str(run), "--verify", "--keep-last", "1"])
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"1 problem in .*\n  {shard} is damaged: \d+ bytes, expected"):
        main([str(run), "--keep-last", "1"])
    assert len(names(run)) == 4


def test_a_run_that_is_training_is_left_alone(run):
    with closing(RunLog(run, active=True)), pytest.raises(ConfigError, match="another run is writing there"):
        main([str(run), "--keep-last", "1"])
    assert len(names(run)) == 4


def test_a_directory_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints; expected a run directory"):
        main([str(tmp_path)])
    with pytest.raises(ConfigError, match="--keep-last 0: expected at least 1"):
        main([str(tmp_path), "--keep-last", "0"])

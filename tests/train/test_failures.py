"""What a failing rank says of itself: where it is, and whether its error is worth a report."""

import signal
from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest

from engine.errors import PeerError
from engine.testing.runs import read_records, run_config
from engine.train import evaluate, run, saving, trainer, warm_up
from engine.train.hooks import Hook
from engine.train.run import train
from engine.train.step import DistributedModel
from engine.train.trainer import Trainer


def failing(*arguments: object, **options: object) -> None:
    raise ValueError("broken on purpose")


class Failing(Hook):
    """A hook that fails, and says nothing of itself."""

    def after_training(self, trainer: Trainer) -> None:
        failing()


def third(function: Callable[..., object]) -> Callable[..., object]:
    """`function`, which fails at its third call."""
    calls = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return failing() if calls == 3 else function(*arguments, **options)

    return call


def second_step_unreadable(trainer: Trainer, num_workers: int) -> Iterator[object]:
    yield next(read(trainer, num_workers))
    failing()


read = Trainer._batches


@pytest.mark.parametrize(
    ("place", "name", "replacement", "position"),
    [
        (run, "build_trainer", failing, "opening tokenizer, data and checkpoints"),
        (evaluate, "evaluate", failing, "before step 1, evaluating"),
        (evaluate, "evaluate", third(evaluate.evaluate), "step 4, evaluating"),
        (Trainer, "_batches", second_step_unreadable, "step 2, reading data"),
        (trainer, "train_step", third(trainer.train_step), "step 3, training"),
        (saving, "save", failing, "step 3, saving a checkpoint"),
        (run, "_hooks", lambda *_: [(1, Failing())], "after step 6, running a hook"),
    ],
)
def test_a_failure_says_at_which_step_and_in_which_phase(workspace, place, name, replacement, position):
    options = ["--train.eval_interval", "2", "--train.eval_steps", "1", "--checkpoint.interval", "3"]
    with patch.object(place, name, replacement), pytest.raises(ValueError, match="broken on purpose") as caught:
        train(run_config(workspace, *options, steps=6))
    assert caught.value.__notes__ == [position]


def test_a_failure_of_the_warm_up_says_so(workspace):
    as_on_a_gpu = patch.object(warm_up, "first_use_waits", lambda device: True)
    fails = patch.object(DistributedModel, "warm_up", failing)
    with as_on_a_gpu, fails, pytest.raises(ValueError, match="broken on purpose") as caught:
        train(run_config(workspace))
    assert caught.value.__notes__ == ["warming up"]


def test_a_failure_in_the_pipeline_says_in_which_action(workspace):
    build = run.build_trainer

    def build_failing(*arguments: object) -> Trainer:
        built = build(*arguments)
        built.model.pipeline.parts = [third(built.model.pipeline.parts[0])]
        return built

    with patch.object(run, "build_trainer", build_failing), pytest.raises(ValueError, match="broken") as caught:
        train(run_config(workspace))
    assert caught.value.__notes__ == ["step 1, training, pipeline stage 0, F2"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_torchrun_stops_after_its_peer_failed_is_silent(workspace, stopped):
    def lose_peer(*_: object, **__: object) -> None:
        if stopped:
            signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")

    with patch.object(trainer, "train_step", lose_peer), pytest.raises(PeerError) as caught:
        train(run_config(workspace))
    lost = caught.value
    assert (lost.reported_elsewhere, lost.patience_s) == (stopped, 0 if stopped else 5)
    assert read_records(workspace / "run/events.jsonl")[-1]["code"] == 69

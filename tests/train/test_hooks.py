from types import SimpleNamespace
from typing import Any

import pytest

from engine.train.hooks import Hook, is_due, train_with_hooks


@pytest.mark.parametrize(
    ("every", "steps"),
    [(0, [10]), (1, list(range(1, 11))), (3, [3, 6, 9, 10]), (5, [5, 10]), (11, [10])],
)
def test_a_hook_is_due_at_multiples_and_at_the_last_step(every, steps):
    assert [step for step in range(1, 11) if is_due(step, every, 10)] == steps


class Noting(Hook):
    def __init__(self, name: str, notes: list[tuple[str, str, int]]) -> None:
        self.name, self.notes = name, notes

    def before_training(self, trainer: Any) -> None:
        self.notes.append((self.name, "before", trainer.progress.step))

    def after_step(self, trainer: Any, result: Any) -> None:
        self.notes.append((self.name, "step", result.step))

    def after_training(self, trainer: Any) -> None:
        self.notes.append((self.name, "after", trainer.progress.step))


def test_hooks_are_called_in_the_order_of_the_list():
    trainer: Any = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(steps=5)), progress=SimpleNamespace())
    trainer.progress.step = 2

    def steps(stop: Any) -> Any:
        for step in (3, 4, 5):
            trainer.progress.step = step
            yield SimpleNamespace(step=step)

    trainer.steps, notes = steps, []
    train_with_hooks(trainer, [(1, Noting("a", notes)), (0, Hook()), (4, Noting("b", notes))], stop=SimpleNamespace())
    assert notes == [
        ("a", "before", 2),
        ("b", "before", 2),
        ("a", "step", 3),
        ("a", "step", 4),
        ("b", "step", 4),
        ("a", "step", 5),
        ("b", "step", 5),
        ("a", "after", 5),
        ("b", "after", 5),
    ]

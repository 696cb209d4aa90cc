import itertools

import pytest

from engine.config.schema import LrScheduleConfig
from engine.optim.schedule import learning_rate


def rates(total: int, **fields) -> list[float]:
    schedule = LrScheduleConfig(**fields)
    return [learning_rate(step, 1.0, schedule, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warmup_reaches_the_peak_and_the_end_reaches_the_minimum(kind):
    values = rates(100, kind=kind, warmup_steps=10, min_lr=0.1)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[9:]))


def test_shapes_between():
    assert rates(101, kind="linear")[50] == pytest.approx(50 / 101)
    assert rates(100, kind="cosine")[49] == pytest.approx(0.5)
    wsd = rates(100, kind="wsd", decay_steps=20)
    assert wsd[79] == 1.0
    assert wsd[89] == pytest.approx(0.5)
    assert rates(100, kind="wsd")[89] == 1.0  # the last tenth decays by default
    assert rates(100, kind="wsd")[90] == pytest.approx(0.9)


def test_degenerate_lengths():
    assert rates(1, kind="cosine", warmup_steps=1) == [1.0]
    assert rates(2, kind="wsd", warmup_steps=2) == [0.5, 1.0]

import pytest

from engine.config.derived import microbatches, with_steps
from engine.errors import ConfigError
from tests.config.minimal import FINE_TUNING, build


def test_an_indivisible_batch_names_the_nearest_that_work():
    batch = build({"batch": {"micro": 2, "global": 10}}).batch
    assert microbatches(batch, 5) == 1
    with pytest.raises(ConfigError, match=r"batch.global = 6 or 12"):
        microbatches(batch, 3)


def test_steps_follow_from_epochs():
    config = build({**FINE_TUNING, "train": {"steps": 0, "epochs": 3}, "lr_schedule": {"warmup_ratio": 0.1}})
    assert with_steps(config, rows=21).train.steps == 8  # 63 rows, 8 to a step
    assert with_steps(config, rows=21).lr_schedule.warmup_steps == 1
    assert with_steps(build({**FINE_TUNING, "train": {"steps": 5, "epochs": 3}}), rows=21).train.steps == 5
    assert with_steps(build({**FINE_TUNING, "train": {"steps": 50, "epochs": 3}}), rows=21).train.steps == 8
    assert with_steps(build()).train.steps == 10
    late = build({**FINE_TUNING, "train": {"steps": 0, "epochs": 3}, "lr_schedule": {"warmup_steps": 9}})
    with pytest.raises(ConfigError, match=r"warmup_steps \+ decay_steps = 9 is more than the 8 steps"):
        with_steps(late, rows=21)

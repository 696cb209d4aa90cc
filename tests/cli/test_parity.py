"""The campaign: what it runs, what it writes, and that it fails. The runs themselves are in tests/parallel."""

from dataclasses import replace

import pytest
import torch

from engine.cli import parity
from engine.config.derived import microbatches
from engine.errors import ConfigError, TriaxisError
from engine.plan.layouts import choose_layout
from engine.plan.memory import ClusterSpec
from engine.testing.parity import Outcome
from engine.testing.parity_cases import PROBLEMS, plan_cases
from engine.testing.runs import run_config


def test_the_plan_meets_every_grid_schedule_and_sharding_with_every_recomputation(tmp_path):
    met = set()
    for problem, cases in plan_cases(list(PROBLEMS), 8):
        for case in cases:
            given = case.parallel
            config = run_config(tmp_path, preset=problem.preset)
            config = config.model_copy(
                update={
                    "parallel": given,
                    "model": config.model.model_copy(update={"num_layers": problem.settings["model.num_layers"]}),
                    "batch": config.batch.model_copy(
                        update={"micro": case.micro, "global_": problem.settings["batch.global"]}
                    ),
                }
            )
            ranks = ClusterSpec(case.ranks, case.ranks, 1 << 40, "cpu", torch.float32)
            assert choose_layout(config, ranks)[0].dp == case.dp  # raises where it cannot be
            assert microbatches(config.batch, case.dp) >= 2
            assert case.ranks <= 8
            met.add((given.tp, given.pp, case.dp, given.schedule, given.sharded_optimizer, given.recompute))
    for tp, pp, dp in ((1, 1, 4), (4, 2, 1), (2, 2, 2), (1, 4, 2)):
        for schedule in ("gpipe", "interleaved", "zero_bubble") if pp > 1 else ("1f1b",):
            for sharded in (True, False) if dp > 1 else (True,):
                for recompute in ("none", "selective", "full"):
                    assert (tp, pp, dp, schedule, sharded, recompute) in met


def test_a_small_world_gets_what_it_admits():
    cases = [case for _, cases in plan_cases(["tiny"], 2) for case in cases]
    assert {case.ranks for case in cases} == {2}
    assert all(case.after is None for case in cases)
    with pytest.raises(ConfigError, match="--ranks 1"):
        parity.main(["--ranks", "1"])


def outcome(loss: float = 1.0) -> Outcome:
    return Outcome([loss], [1.0], {"model.norm.weight": torch.ones(2)}, [])


def test_what_is_out_of_tolerance_is_named_and_not_written(tmp_path, monkeypatch, capsys):
    def measure(directory, problem, cases, **_):
        return [replace(outcome(), torn=["x"]) if case.parallel.tp == 2 else outcome() for case in cases]

    monkeypatch.setattr(parity, "measure", measure)
    page = tmp_path / "parity.md"
    with pytest.raises(TriaxisError, match=r"1 deviations out of tolerance.*\n  tiny, dp=1 tp=2 .*: ranks differ in x"):
        parity.main(["--ranks", "2", "--presets", "tiny", "--output", str(page)])
    assert not page.exists()
    assert "OUT OF TOLERANCE" in capsys.readouterr().out


def test_the_page_has_a_row_for_every_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity, "measure", lambda directory, problem, cases, **_: [outcome(1 + 1e-6)] * len(cases))
    page = tmp_path / "parity.md"
    parity.main(["--ranks", "2", "--presets", "tiny", "--output", str(page)])
    text = page.read_text()
    assert (
        "| pp2 | zero_bubble | recompute selective, small buckets | 0.0e+00 | 0.0e+00 | 0.0e+00 | norm.weight |" in text
    )
    assert "(3 of 26; the others were not run)" in text
    assert "| tiny | optimizer.eps 1e-08 |" in text
    assert "7/7 | tiny" in capsys.readouterr().out

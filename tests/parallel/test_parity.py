"""Parity is the contract: whatever the layout, a run gives the numbers of a single process. `tools/parity.py` runs many
more layouts, and docs/parity.md has what it measured."""

import math
from dataclasses import replace

import pytest
import torch

from engine.config.schema import ParallelConfig as Parallel
from engine.testing.parity import Case, Outcome, Problem, deviation, measure

ONE = Case(micro=2)
SMALL = 10_000  # elements: about a bucket a layer

LLAMA = Problem("tiny", {"batch.global": 8, "train.z_loss": 1e-2})
QWEN2 = Problem("tiny-qwen2", {"batch.global": 6})  # two data-parallel ranks have 3 microbatches each
QWEN3 = Problem("tiny-qwen3", {"batch.global": 4, "data.document_mask": False, "model.num_kv_heads": 1})
STARCODER2 = Problem("tiny-starcoder2", {"batch.global": 8, "train.z_loss": 1e-3, "model.sliding_window": 12})
OLMO2 = Problem("tiny-olmo2", {"batch.global": 4, "model.num_kv_heads": 1})  # which ranks share, in norms as well
GEMMA2 = Problem("tiny-gemma2", {"batch.global": 4, "model.sliding_window": 12})
GEMMA3 = Problem("tiny-gemma3", {"batch.global": 4, "model.sliding_window": 12})
GRANITE = Problem("tiny-granite", {"batch.global": 4, "model.init_std": 0.15})
PHI3 = Problem("tiny-phi3", {"batch.global": 4})
MINISTRAL = Problem("tiny-ministral", {"batch.global": 4, "model.sliding_window": 12})

TABLE = [
    (
        LLAMA,
        [
            Case(Parallel(tp=2), micro=4),
            Case(dp=2, micro=2, bucket_size=SMALL),
            Case(Parallel(sharded_optimizer=False), dp=4),
            Case(Parallel(pp=2, schedule="gpipe", recompute="selective", recompute_layers=1), micro=2),
            Case(Parallel(pp=4, recompute="full"), micro=2),
            Case(Parallel(tp=2), dp=2, micro=2, bucket_size=SMALL),
        ],
    ),
    (
        QWEN2,
        [
            Case(Parallel(tp=4, recompute="full", recompute_layers=2), micro=6),
            Case(Parallel(pp=2), dp=2, bucket_size=SMALL),
            Case(Parallel(pp=2, schedule="interleaved", virtual_stages=2), dp=2),
            Case(Parallel(tp=2, pp=2, schedule="zero_bubble", recompute="selective"), micro=2),
            Case(Parallel(pp=4, schedule="zero_bubble", layers_per_stage=(1, 2, 1, 0))),
            Case(Parallel(tp=4), micro=6, after=Case(dp=2, bucket_size=SMALL)),
        ],
    ),
    (
        QWEN3,
        [
            Case(Parallel(tp=4, sharded_optimizer=False), micro=4),
            Case(Parallel(tp=2, pp=2, schedule="gpipe", recompute="full"), micro=2),
            Case(Parallel(pp=2, schedule="zero_bubble"), dp=2, micro=1),
            Case(Parallel(tp=2, recompute="selective", sharded_optimizer=False), dp=2, micro=2),
        ],
    ),
    (
        STARCODER2,
        [
            Case(Parallel(pp=2, layers_per_stage=(4, 0)), micro=2, bucket_size=SMALL),
            Case(Parallel(pp=4, schedule="gpipe"), micro=2),
            Case(Parallel(tp=2, pp=2, schedule="interleaved", virtual_stages=2, recompute="selective"), micro=4),
            Case(Parallel(pp=2, schedule="zero_bubble", sharded_optimizer=False), dp=2, micro=2),
            Case(Parallel(tp=2, recompute="full"), dp=2, micro=4),
            Case(dp=4, micro=2, after=Case(Parallel(tp=2, pp=2), micro=4)),
            Case(Parallel(pp=2, schedule="zero_bubble"), dp=2, micro=2, after=Case(Parallel(tp=2), micro=4)),
        ],
    ),
    (OLMO2, [Case(Parallel(tp=2, pp=2, recompute="selective"), micro=2), Case(Parallel(tp=4), micro=4)]),
    (GEMMA2, [Case(Parallel(tp=2), dp=2, micro=2), Case(Parallel(pp=2, recompute="selective"), micro=2)]),
    (GEMMA3, [Case(Parallel(tp=2, pp=2), micro=2)]),
    (GRANITE, [Case(Parallel(tp=2, pp=2), micro=2)]),
    (PHI3, [Case(Parallel(tp=2), micro=2)]),
    (MINISTRAL, [Case(Parallel(pp=2), micro=2)]),
]


def found(outcome: Outcome, reference: Outcome) -> list[str]:
    return deviation(outcome, reference).problems() + [f"ranks differ in {name}" for name in outcome.torn]


@pytest.mark.parametrize(("problem", "cases"), TABLE, ids=[problem.preset for problem, _ in TABLE])
def test_every_layout_gives_the_numbers_of_one_process(tmp_path, problem, cases):
    reference, *outcomes = measure(tmp_path, problem, [ONE, *cases])
    assert len(reference.losses) == 23
    assert reference.losses[19] < 0.8 * reference.losses[0]  # there is something to get wrong:
    assert min(reference.grad_norms) < 2 < max(reference.grad_norms)  # the model learns, some steps are clipped
    problems = [
        f"{case}: {text}" for case, outcome in zip(cases, outcomes, strict=True) for text in found(outcome, reference)
    ]
    assert not problems, "\n".join(problems)


def test_a_layout_repeats_itself_bitwise(tmp_path):
    problem = Problem("tiny-starcoder2", {"batch.global": 4, "run.deterministic": True})
    case = Case(Parallel(tp=2, pp=2, schedule="zero_bubble", recompute="full"), micro=2)
    once, again = measure(tmp_path, problem, [case, case])
    assert (once.losses, once.grad_norms) == (again.losses, again.grad_norms)
    assert all(value.equal(again.parameters[name]) for name, value in once.parameters.items())


def test_deviations_are_the_largest_ones_and_nan_is_out_of_tolerance():
    one = Outcome([1.0, 2.0], [4.0], {"a": torch.ones(4), "b": torch.ones(4)}, [])
    other = Outcome([1.0, 2.0001], [4.0], {"a": torch.ones(4), "b": torch.tensor([1, 1, 1, 1.5])}, [])
    off = deviation(other, one)
    assert (off.loss, off.grad_norm, off.worst) == (pytest.approx(5e-5), 0.0, "b")
    assert off.parameters == pytest.approx(0.25)
    assert off.problems() == ["loss off by 5.0e-05 (tolerance 1e-05)", "parameters off by 2.5e-01 (tolerance 1e-04), b"]
    lost = deviation(
        replace(one, losses=[1.0, math.nan], parameters={"a": torch.full((4,), math.nan), "b": torch.ones(4)}), one
    )
    assert [text.partition(" (")[0] for text in lost.problems()] == ["loss off by nan", "parameters off by nan"]
    assert lost.worst == "a"

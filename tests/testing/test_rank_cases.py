"""The cases of tests/gpu/test_ranks.py on a CPU, over the staging group: what differs there is the device alone."""

from dataclasses import replace

import pytest
import torch

from engine.testing.rank_cases import RANK_CASES, RankPlace, References, deviations_from_one, generate_ids, train_case

HERE = RankPlace("cpu", "staged")


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("one rank"), HERE.device)


@pytest.mark.parametrize("name", RANK_CASES)
def test_ranks_give_the_numbers_of_one(tmp_path, references, name):
    case = RANK_CASES[name]
    outcome = train_case(tmp_path, case.problem, case.case, HERE)
    assert deviations_from_one(case, outcome, references.outcome(case.problem)) == []


def test_two_ranks_write_what_one_writes(references):
    ((ids, whole),), two = (generate_ids(references.run("fp32"), ranks, HERE) for ranks in (1, 2))
    assert len(ids) == 24
    assert len(set(ids)) > 6
    assert [rank[0] for rank in two] == [ids, ids]
    assert all(held < 0.7 * whole for _, held in two)


def test_deviations_are_named(references):
    outcome, case = references.outcome("fp32"), RANK_CASES["tp 2"]
    other = replace(outcome, losses=[loss * 1.001 for loss in outcome.losses], torn=["a.weight"])
    assert deviations_from_one(case, outcome, outcome) == []
    assert deviations_from_one(case, other, outcome) == [
        "loss off by 1.0e-03 (tolerance 1e-05)",
        "ranks differ in a.weight",
    ]
    assert deviations_from_one(RANK_CASES["FP8 delayed, tp 2"], other, outcome) == ["ranks differ in a.weight"]


NOWHERE = {
    "cuda": (RankPlace("cuda", "gloo"), "run.device = cuda: local rank"),
    "mpi": (RankPlace("cpu", "mpi"), "MPI"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the case would run")
@pytest.mark.parametrize("name", NOWHERE)
def test_cases_run_where_they_are_told(tmp_path, references, name):
    place, message = NOWHERE[name]
    with pytest.raises(RuntimeError, match=message):
        train_case(tmp_path, "fp32", RANK_CASES["dp 2"].case, place)
    with pytest.raises(RuntimeError, match=message):
        generate_ids(references.run("fp32"), 2, place)

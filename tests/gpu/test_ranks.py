"""Several ranks on one GPU give the numbers of one rank on it: through the host, and over NCCL.

NCCL lets ranks share a GPU from 2.30 on; where an older one is loaded, its cases are skipped unless there is a GPU for
every rank (tools/bench/README.md: how to load a newer one). Every case runs in processes of its own. One that hangs
ends after `TIMEOUT_S` with the stacks of all ranks and, over NCCL, the last entries of the flight recorder.
"""

import pytest
import torch

from engine.testing.rank_cases import RANK_CASES, RankPlace, References, deviations_from_one, generate_ids, train_case

TIMEOUT_S = 90.0  # without MPS every collective waits for a time slice of the card
SHARES_FROM = (2, 30)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("one rank"), "cuda")


@pytest.fixture(params=["staged", "nccl"])
def backend(request):
    return request.param


def require(backend: str, ranks: int) -> None:
    """Skip where NCCL would refuse the ranks."""
    version = torch.cuda.nccl.version()[:2] if backend == "nccl" else SHARES_FROM
    if ranks > torch.cuda.device_count() and version < SHARES_FROM:
        pytest.skip(f"NCCL {version[0]}.{version[1]} does not let {ranks} ranks share a GPU, 2.30 does; see LD_PRELOAD")


@pytest.mark.parametrize("name", RANK_CASES)
def test_ranks_give_the_numbers_of_one(tmp_path, references, backend, name):
    case = RANK_CASES[name]
    require(backend, case.case.ranks)
    outcome = train_case(tmp_path, case.problem, case.case, RankPlace("cuda", backend, TIMEOUT_S))
    assert deviations_from_one(case, outcome, references.outcome(case.problem)) == []


def test_two_ranks_write_what_one_writes(references, backend):
    require(backend, 2)
    place = RankPlace("cuda", backend, TIMEOUT_S)
    ((ids, whole),), two = (generate_ids(references.run("fp32"), ranks, place) for ranks in (1, 2))
    assert len(ids) == 24
    assert [rank[0] for rank in two] == [ids, ids]
    assert all(held < 0.7 * whole for _, held in two)

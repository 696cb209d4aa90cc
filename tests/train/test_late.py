"""Who is blamed for a hang, from made-up reports."""

import pytest

from engine.train.late import RankReport, describe_hang, find_late


def waiting(rank: int, axis: str, calls: dict[str, int], *, peers=(), text="step 5, training", number=10) -> RankReport:
    return RankReport(
        rank, "node", text, number=number, waits=axis, calls=calls, peers=peers, where="collectives.py:1 wait"
    )


def busy(rank: int, **fields) -> RankReport:
    return RankReport(rank, "node", "step 5, training", where="loader.py:1 read", **fields)


DP = waiting(0, "dp", {"dp": 7, "control": 5})


@pytest.mark.parametrize(
    ("reports", "late"),
    [
        ([DP, busy(1, stopped=True)], [1]),
        ([DP, busy(1, silent=True)], [1]),
        ([DP, busy(1, stopped_children=(77,))], [1]),
        ([DP, busy(1)], [1]),
        ([DP], [1]),  # no answer
        ([busy(0), busy(1)], []),  # both wait for their devices
        ([DP, waiting(1, "dp", {"dp": 7, "control": 5})], []),  # all have come
        # rank 1 left out a call of dp and went on
        ([DP, waiting(1, "control", {"dp": 6, "control": 6}, text="step 6, reading data", number=20)], [1]),
        # the same, with those that made it in the majority and all in one phase
        (
            [
                *(waiting(rank, "dp", {"dp": 7, "world": 2}) for rank in range(3)),
                waiting(3, "world", {"dp": 6, "world": 3}),
            ],
            [3],
        ),
        # tp 2 x dp 2: rank 1 left out a call of tp; the others wait in later ones, for rank 0 and for each other
        (
            [
                waiting(0, "tp", {"tp": 9, "dp": 1, "world": 4}, peers=(0, 1), number=10),
                waiting(1, "world", {"tp": 8, "dp": 2, "world": 5}, number=30),
                waiting(2, "dp", {"tp": 9, "dp": 2, "world": 4}, peers=(0, 2), number=20),
                waiting(3, "world", {"tp": 9, "dp": 2, "world": 5}, number=30),
            ],
            [1],
        ),
        # stage 1 waits for the message of stage 0, which waits for it in a later call
        (
            [
                waiting(0, "control", {"control": 6}, text="step 6, reading data", number=9),
                waiting(1, "pipeline", {"control": 5}, peers=(0,)),
            ],
            [0],
        ),
    ],
)
def test_the_rank_that_others_wait_for_is_blamed(reports, late):
    size = max(2, len(reports))
    assert sorted(find_late({report.rank: report for report in reports}, size)) == late


def test_a_report_survives_the_store():
    report = waiting(3, "tp", {"tp": 9}, peers=(2, 3))
    assert RankReport.from_json(report.to_json()) == report


def test_a_message_lists_eight_ranks_at_most():
    reports = {rank: waiting(rank, "dp", {"dp": 7}) for rank in range(999)} | {999: busy(999, stopped=True)}
    said = describe_hang(reports, 1000, 120.0)
    assert said.startswith(
        "no progress for 120 s: rank 999 (node) is stopped (SIGSTOP): step 5, training; waiting: rank 0 in dp"
    )
    assert said.endswith(" and 991 more")

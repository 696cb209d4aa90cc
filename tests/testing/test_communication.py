"""The rules that records of ranks are held against, on programs written by hand."""

from dataclasses import replace

import pytest

from engine.testing.communication import CHECKS, Group, NewGroup, Record, listed, problems
from tests.testing.programs import Program, records

DP = Group("1", "dp", (0, 1))
TP = Group("2", "tp", (0, 1))
FORWARD = Group("3", "forward", (0, 1))


def healthy(rank: int) -> Program:
    """Two collectives and two messages from rank 0 to rank 1."""
    program = Program(rank).make(DP, TP, FORWARD)
    gather = program.launch("all_gather", DP)
    program.call("all_reduce", TP).wait(gather)
    for message in ("F0", "F1"):
        number = program.send(FORWARD, 1, message) if rank == 0 else program.receive(FORWARD, 0, message)
        program.wait(number)
    return program


def only(*ranks: Program | Record) -> str:
    """The one problem of some programs; it must be found by one check, and by no other."""
    made = [rank if isinstance(rank, Record) else rank.record() for rank in ranks]
    by_check = {name: problems(made, checks=[name]) for name in CHECKS}
    found = [text for texts in by_check.values() for text in texts]
    assert found == problems(made)
    (text,) = found
    return text


def changed(rank: int, **changes: object) -> Record:
    """The healthy program with changes in its first launch."""
    record = healthy(rank).record()
    events = [
        replace(event, **changes) if getattr(event, "kind", "") == "all_gather" else event for event in record.events
    ]
    return replace(record, events=tuple(events))


def test_a_healthy_program_has_no_problems():
    assert problems(records([healthy(0), healthy(1)])) == []


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"shape": (5,)}, "all_gather of float32 [5]"),
        ({"dtype": "bfloat16"}, "all_gather of bfloat16 [4]"),
        ({"detail": "max"}, "all_gather of float32 [4] (max)"),
        ({"kind": "reduce_scatter"}, "reduce_scatter of float32 [4]"),
    ],
)
def test_members_must_launch_the_same(changes, seen):
    assert only(healthy(0), changed(1, **changes)) == (
        "dp group of ranks 0, 1, number 0: rank 0 all_gather of float32 [4] at engine/all_gather.py:0, "
        f"but rank 1 {seen} at engine/all_gather.py:0"
    )


def test_a_collective_that_one_member_leaves_out():
    more = healthy(0).call("all_reduce", DP)
    assert only(more, healthy(1)) == (
        "dp group of ranks 0, 1, number 1: rank 0 all_reduce of float32 [4] (sum) at engine/all_reduce.py:4, "
        "but rank 1 nothing more"
    )


def test_a_group_that_only_one_member_uses():
    only_group = Group("4", "kv", (0, 1))
    first = healthy(0).make(only_group).call("barrier", only_group)
    assert "kv group of ranks 0, 1, number 0: rank 0 barrier" in only(first, healthy(1).make(only_group))


def test_messages_must_be_those_that_are_expected():
    swapped = Program(1).make(DP, TP, FORWARD)
    gather = swapped.launch("all_gather", DP)
    swapped.call("all_reduce", TP).wait(gather)
    swapped.wait(swapped.receive(FORWARD, 0, "F1")).wait(swapped.receive(FORWARD, 0, "F0"))
    assert only(healthy(0), swapped) == (
        "forward channel from rank 0 to 1, number 0: rank 0 send of float32 [4] (F0) at engine/send.py:2, "
        "but rank 1 recv of float32 [4] (F1) at engine/recv.py:2"
    )


@pytest.mark.parametrize(("size", "message"), [(4, "F2"), (8, "F1")])
def test_messages_must_come_and_fit(size, message):
    first, second = healthy(0), healthy(1)
    first.wait(first.send(FORWARD, 1, "F2"))
    if size != 4:
        second.wait(second.launch("recv", FORWARD, peer=0, message="F2", size=size))
    found = only(first, second)
    assert found.startswith("forward channel from rank 0 to 1, number 2: rank 0 send of float32 [4] (F2)")
    assert found.endswith("rank 1 nothing more" if size == 4 else "rank 1 recv of float32 [8] (F2) at engine/recv.py:4")


def test_every_launch_must_be_waited_for_once():
    second = healthy(1)
    never = second.events.pop()
    assert only(healthy(0), second) == (
        "rank 1 waits never for recv of float32 [4] (F1) at engine/recv.py:3 on forward group of ranks 0, 1; "
        "wait for it once"
    )
    second.events += [never, never]
    assert only(healthy(0), second).startswith("rank 1 waits 2 times for recv")


def test_no_wait_comes_before_its_launch():
    second = healthy(1)
    second.events[-2:] = reversed(second.events[-2:])
    assert only(healthy(0), second) == "rank 1 waits for its launch 3 before it makes it (engine/wait.py:3)"


def test_what_recording_found_is_passed_on():
    assert only(healthy(0), healthy(1).record("mm reads memory under way")) == "rank 1: mm reads memory under way"


def test_groups_must_have_one_name():
    other = Group("7", "kv", (0, 1))
    first, second = healthy(0).make(other), healthy(1).make(Group("8", "kv", (0, 1)))
    assert only(first, second) == (
        "kv group of ranks 0, 1: rank 0 makes it as 7, rank 1 as 8; they would wait for each other forever: "
        "make the same groups in the same order"
    )
    assert "rank 1 as nothing" in only(first, healthy(1))


def test_groups_must_be_made_in_orders_that_agree():
    programs = [healthy(0), healthy(1)]
    programs[1].events[:2] = reversed(programs[1].events[:2])
    assert only(*programs) == (
        "rank 0 makes the dp group of ranks 0, 1 before the tp group of ranks 0, 1, but "
        "rank 1 makes the tp group of ranks 0, 1 before the dp group of ranks 0, 1; "
        "make groups in one order on all ranks"
    )


def test_orders_that_contradict_each_other_over_three_ranks():
    a, b, c = (
        Group(str(i), axis, ranks) for i, (axis, ranks) in enumerate([("a", (0, 1)), ("b", (1, 2)), ("c", (0, 2))])
    )
    orders = [[c, a], [a, b], [b, c]]
    made = [Record(rank, tuple(map(NewGroup, groups))) for rank, groups in enumerate(orders)]
    assert only(*made).count("before the") == 3
    made[0] = Record(0, (NewGroup(a), NewGroup(c)))
    assert problems(made) == []


def test_a_group_must_be_made_before_it_is_used():
    unmade = Group("9", "tp", (0, 1))
    assert problems(records([healthy(rank).call("barrier", unmade) for rank in (0, 1)])) == [
        "rank 0 uses tp group of ranks 0, 1, which it has not made",
        "rank 1 uses tp group of ranks 0, 1, which it has not made",
    ]


def test_a_member_without_a_record():
    assert problems([healthy(0).record()]) == ["ranks 1 belong to groups and have no record"]
    assert problems([healthy(0).record()], symmetric=True) == []


def test_many_ranks_are_listed_shortly():
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(0, 64, 2)) == "0, 2, 4, 6, … (32)"

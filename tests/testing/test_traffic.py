"""Bytes, launches and communicators of a program written by hand."""

import pytest

from engine.testing.communication import Group, Launch, Phase
from engine.testing.traffic import Traffic, busiest, communicators, phases, sent_bytes, traffic
from tests.testing.programs import Program

DP = Group("1", "dp", (0, 1, 2, 3))
FORWARD = Group("2", "forward", (0, 4, 8))
CONTROL = Group("3", "control", tuple(range(12)))


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all_gather", 300), ("reduce_scatter", 300), ("all_reduce", 600), ("all_to_all", 300), ("broadcast", 400)],
)
def test_bytes_of_a_ring(kind, sent):
    program = Program(0).call(kind, DP, size=100)
    assert traffic(program.events).sent == {("dp", kind): sent}


def test_a_ring_passes_every_other_members_part_on():
    """n − 1 times, a rank sends the part of a member to its neighbor."""
    parts = [{rank} for rank in DP.ranks]
    sent = 0
    for _ in range(len(parts) - 1):
        parts = [own | before for own, before in zip(parts, [parts[-1], *parts[:-1]], strict=True)]
        sent += 1
    assert all(len(part) == len(DP.ranks) for part in parts)
    part = 100 * 4 // len(DP.ranks)
    assert traffic(Program(0).call("all_gather", DP, size=100).events).sent.total() == sent * part


def test_messages_and_barriers():
    program = Program(0)
    program.wait(program.send(FORWARD, 4, "F0"), program.receive(FORWARD, 4, "B0")).call("barrier", DP)
    assert traffic(program.events).sent == {("forward", "send"): 16, ("forward", "recv"): 0, ("dp", "barrier"): 0}
    assert traffic(program.events).launches.total() == 3
    (barrier,) = (event for event in program.events if isinstance(event, Launch) and event.kind == "barrier")
    assert sent_bytes(barrier) == 0


def test_the_peak_counts_what_is_not_waited_for():
    program = Program(0)
    first, second = program.launch("all_gather", DP, size=10), program.launch("all_gather", DP, size=20)
    program.wait(first)
    program.wait(program.launch("all_reduce", DP, size=5), second)
    assert traffic(program.events).peak_bytes == 4 * 30
    assert traffic(program.events[3:]).peak_bytes == 4 * 5


def test_communicators_of_a_rank():
    """Each pair of ranks has one for its messages, whatever their direction; the control group has none."""
    program = Program(4).make(DP, FORWARD, CONTROL).call("all_reduce", CONTROL)
    for peer in (0, 8):
        program.call("send", FORWARD, peer=peer).call("recv", FORWARD, peer=peer)
    program.call("all_reduce", FORWARD).call("all_reduce", DP).call("all_gather", DP)
    assert communicators(program.record()) == {"forward": 3, "dp": 1}


def test_the_phases_of_a_program():
    program = Program(0).make(DP).call("all_gather", DP)
    for step in (1, 2):
        program.events.append(Phase(f"step {step}"))
        for _ in range(step):
            program.call("all_reduce", DP)
    launches = {name: traffic(events).launches for name, events in phases(program.record()).items()}
    assert launches == {
        "": {("dp", "all_gather"): 1},
        "step 1": {("dp", "all_reduce"): 1},
        "step 2": {("dp", "all_reduce"): 2},
    }


def test_the_busiest_rank_of_each_kind():
    parts = [traffic(Program(0).call(kind, DP, size=size).events) for kind, size in [("all_gather", 4), ("barrier", 9)]]
    assert busiest([*parts, parts[0]]) == Traffic(
        parts[0].sent,
        parts[0].launches + parts[1].launches,
        36,  # type: ignore[arg-type]
    )

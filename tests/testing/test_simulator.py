"""The simulator of communicating ranks: small programs, a naive reference, and the theorem that its modes rest on."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.testing.communication import Group, HostSync, Launch, NewGroup, Record, Wait, problems
from engine.testing.simulator import MODES, find_hang, unsafe_stops, with_stops
from tests.testing.programs import Program, records

FORWARD, BACKWARD, TP = Group("1", "forward", (0, 1)), Group("2", "backward", (0, 1)), Group("3", "tp", (0, 1))
CONTROL = Group("4", "control", (0, 1))


def verdicts(programs: list[Program]) -> str:
    """The modes in which the programs come to their end, by their first letters."""
    assert problems(records(programs)) == []
    return "".join(
        mode[0] if mode != "synchronous" else "x" for mode in MODES if not find_hang(records(programs), mode)
    )


def pair() -> tuple[Program, Program]:
    """Two ranks that have made and connected a group of each kind."""
    programs = Program(0).make(FORWARD, BACKWARD, TP), Program(1).make(FORWARD, BACKWARD, TP)
    for program in programs:
        for group in (FORWARD, BACKWARD):
            kind = "send" if (program.rank == 0) == (group is FORWARD) else "recv"
            program.call(kind, group, peer=1 - program.rank)
        program.call("all_reduce", TP)
    return programs


def test_a_receive_posted_ahead_of_what_it_depends_on():
    """Harmless unless a host stops."""
    first, second = pair()
    backward = first.receive(BACKWARD, 1, "B0")
    first.wait(first.send(FORWARD, 1, "F0"), backward)
    second.call("recv", FORWARD, peer=0, message="F0").call("send", BACKWARD, peer=0, message="B0")
    assert verdicts([first, second]) == "so"
    assert unsafe_stops(records([first, second])) == [{0: 10}]


def test_two_receives_posted_ahead_on_one_channel():
    """The second cannot start before the first has ended, and in a shared queue holds what comes behind it."""
    first, second = pair()
    backwards = [first.receive(BACKWARD, 1, message) for message in ("B0", "B1")]
    first.wait(first.send(FORWARD, 1, "F0"), *backwards)
    second.call("recv", FORWARD, peer=0, message="F0")
    second.call("send", BACKWARD, peer=0, message="B0").call("send", BACKWARD, peer=0, message="B1")
    assert verdicts([first, second]) == "s"
    assert find_hang(records([first, second]), "one queue") == (
        "one queue: 2 of 2 ranks hang: rank 0 is in recv of float32 [4] (B0) at engine/recv.py:3 and waits for rank 1 "
        "→ rank 1 is in recv of float32 [4] (F0) at engine/recv.py:3 and waits for rank 0"
    )


def test_order_on_one_communicator():
    """Two channels of opposite direction on one group: each pair of ranks has one stream for both."""
    first, second = pair()
    first.wait(first.receive(FORWARD, 1, "B0"), first.send(FORWARD, 1, "F0"))
    second.wait(second.receive(FORWARD, 0, "F0"), second.send(FORWARD, 0, "B0"))
    assert verdicts([first, second]) == ""


def one_f_one_b(first_posts: bool, second_posts: bool) -> list[Program]:
    """The middle of 1F1B on two stages: stage 0 sends F2 and needs B1, stage 1 sends B1 and needs F2.

    A stage that posts has its receive under way before it sends.
    """
    programs = pair()
    for program, posts, there, back, out, into in (
        (programs[0], first_posts, FORWARD, BACKWARD, "F2", "B1"),
        (programs[1], second_posts, BACKWARD, FORWARD, "B1", "F2"),
    ):
        peer = 1 - program.rank
        if posts:
            receive = program.receive(back, peer, into)
            send = program.send(there, peer, out)
        else:
            send = program.send(there, peer, out)
            receive = program.receive(back, peer, into)
        program.wait(receive, send)
    return list(programs)


def test_stops_of_two_hosts_can_hang_where_each_alone_is_safe():
    programs = records(one_f_one_b(True, True))
    assert unsafe_stops(programs) == []
    both = unsafe_stops(programs, at_once=2)
    assert both and all(set(stops) == {0, 1} for stops in both)
    assert find_hang(programs, "streams") is None
    assert find_hang(programs, "synchronous") == (
        "synchronous: 2 of 2 ranks hang: "
        "rank 0 stops at recv of float32 [4] (B1) at engine/recv.py:3 and waits for rank 1 → "
        "rank 1 stops at recv of float32 [4] (F2) at engine/recv.py:3 and waits for rank 0"
    )


@pytest.mark.parametrize("posts", [(True, False), (False, True)])
def test_one_side_may_post_its_receive_ahead(posts):
    programs = one_f_one_b(*posts)
    assert verdicts(programs) == "sox"
    assert unsafe_stops(records(programs), at_once=2) == []


def test_no_receive_ahead_on_either_side_hangs_where_sends_block():
    assert verdicts(one_f_one_b(False, False)) == "so"


def test_a_stop_of_the_host_waits_for_receives_that_are_posted():
    first, second = pair()
    backward = first.receive(BACKWARD, 1, "B0")
    first.stop().wait(first.send(FORWARD, 1, "F0"), backward)
    second.call("recv", FORWARD, peer=0, message="F0").call("send", BACKWARD, peer=0, message="B0")
    assert verdicts([first, second]) == ""
    assert find_hang(records([first, second]), "streams") == (
        "streams: 2 of 2 ranks hang: rank 0 (whose host waits for its device at engine/item.py:1) is in "
        "recv of float32 [4] (B0) at engine/recv.py:3 and waits for rank 1 → rank 1 is in recv of float32 [4] (F0) at "
        "engine/recv.py:3 and waits for rank 0"
    )


def test_a_communicator_is_created_at_its_first_use():
    """The host then waits for the device, which waits for a message that needs what the host would launch next."""
    late = Group("5", "late", (0, 1))
    first, second = pair()
    first.make(late)
    second.make(late)
    receive = first.receive(BACKWARD, 1, "B0")
    first.call("all_reduce", late).wait(receive)
    second.call("all_reduce", late).call("send", BACKWARD, peer=0, message="B0")
    text = find_hang(records([first, second]), "streams")
    assert text is not None and "rank 0 (whose host waits for its device at all_reduce" in text


def test_a_communicator_that_exists_holds_no_host():
    first, second = pair()
    receive = first.receive(BACKWARD, 1, "B0")
    first.call("all_reduce", TP).wait(receive)
    second.call("all_reduce", TP).call("send", BACKWARD, peer=0, message="B0")
    assert verdicts([first, second]) == "so"


def test_the_control_group_holds_the_host_and_not_the_device():
    first, second = pair()
    for program in (first, second):
        program.make(CONTROL)
    receive = first.receive(BACKWARD, 1, "B0")
    first.call("all_reduce", CONTROL).wait(receive)
    second.call("all_reduce", CONTROL).call("send", BACKWARD, peer=0, message="B0")
    assert verdicts([first, second]) == "so"
    second.call("all_reduce", CONTROL)
    assert find_hang(records([first, second]), "streams") == (
        "streams: 1 of 2 ranks hang: "
        "rank 1 stops at all_reduce of float32 [4] (sum) at engine/all_reduce.py:5 and waits for rank 0 → "
        "rank 0 never launches it"
    )


def test_groups_are_made_together():
    first, second = Program(0).make(TP, FORWARD), Program(1).make(FORWARD, TP)
    assert find_hang(records([first, second]), "streams") == (
        "streams: 2 of 2 ranks hang: rank 0 stops at the making of the tp group of ranks 0, 1 and waits for rank 1 → "
        "rank 1 stops at the making of the forward group of ranks 0, 1 and waits for rank 0"
    )


def test_an_operation_that_nobody_waits_for_must_end_too():
    first, second = pair()
    first.launch("all_reduce", TP)
    text = find_hang(records([first, second]), "streams")
    assert text is not None and text.endswith("waits for rank 1 → rank 1 never launches it")


def test_members_without_a_record_are_left_out():
    wide = Group("6", "dp", tuple(range(64)))
    assert find_hang([Program(0).make(wide).call("all_reduce", wide).record()], "synchronous") is None


def test_a_cycle_leaves_out_those_who_wait_for_it():
    """Ranks 1 and 2 wait for each other, and rank 0 for rank 1."""
    groups = [Group(str(i), "tp", ranks) for i, ranks in enumerate([(0, 1), (1, 2), (1, 2)])]
    orders = [[0], [1, 2, 0], [2, 1]]
    made = [Program(rank).make(*groups) for rank in range(3)]
    for program, order in zip(made, orders, strict=True):
        for group in order:
            program.call("barrier", groups[group])
    text = find_hang(records(made), "synchronous")
    assert text is not None and text.startswith("synchronous: 3 of 3 ranks hang: rank 1 stops") and text.count("→") == 1


GROUPS = [
    *(
        Group(f"c{i}", axis, ranks)
        for i, (axis, ranks) in enumerate([("tp", (0, 1)), ("dp", (1, 2)), ("world", (0, 1, 2))])
    ),
    Group("control", "control", (0, 1, 2)),
]
PAIRS = [(group, *sides) for group in GROUPS[:3] for sides in product(group.ranks, repeat=2) if sides[0] != sides[1]]


@st.composite
def programs(draw: st.DrawFn, swaps: int) -> list[Record]:
    """Programs of three ranks that agree with one order, but for up to `swaps` launches that come earlier somewhere.

    Waits come any time after their launch; hosts stop anywhere.
    """
    few = draw(st.lists(st.sampled_from([*GROUPS, *PAIRS]), min_size=1, max_size=4))  # so that they queue
    operations = draw(st.lists(st.sampled_from(few), min_size=1, max_size=8))
    orders: list[list[tuple[int, object]]] = [[], [], []]
    for number, operation in enumerate(operations):
        members = operation.ranks if isinstance(operation, Group) else operation[1:]
        for rank in members:
            orders[rank].append((number, operation))
    for _ in range(draw(st.integers(0, swaps))):
        order = draw(st.sampled_from(orders))
        if len(order) > 1:
            moved = order.pop(draw(st.integers(0, len(order) - 1)))
            order.insert(draw(st.integers(0, len(order))), moved)
    return [_program(draw, rank, order) for rank, order in enumerate(orders)]


def _program(draw: st.DrawFn, rank: int, order: list[tuple[int, object]]) -> Record:
    program, open_waits = Program(rank).make(*GROUPS), []
    for number, operation in order:
        if isinstance(operation, Group):
            open_waits.append(program.launch("all_reduce", operation))
        else:
            group, source, target = operation
            kind, peer = ("send", target) if rank == source else ("recv", source)
            open_waits.append(program.launch(kind, group, peer=peer, message=str(number)))
        while open_waits and draw(st.booleans()):
            program.wait(open_waits.pop(draw(st.integers(0, len(open_waits) - 1))))
        if draw(st.integers(0, 4)) == 0:
            program.stop()
    return program.wait(*open_waits).record()


@settings(max_examples=300, deadline=None)
@given(programs(swaps=2), st.data())
def test_what_ends_synchronously_ends_on_any_hardware_wherever_hosts_stop(made, data):
    if find_hang(made, "synchronous") is not None:
        return
    positions = [data.draw(st.lists(st.integers(0, len(record.events)), max_size=6)) for record in made]
    stopped = [with_stops(record, places) for record, places in zip(made, positions, strict=True)]
    for mode in MODES:
        assert find_hang(stopped, mode) is None


@settings(max_examples=300, deadline=None)
@given(programs(swaps=0))
def test_programs_that_agree_with_one_order_end_synchronously(made):
    assert find_hang(made, "synchronous") is None


@settings(max_examples=400, deadline=None)
@given(programs(swaps=3), st.sampled_from(MODES))
def test_against_a_naive_reference(made, mode):
    assert (find_hang(made, mode) is None) == naive(made, mode)


def naive(made: list[Record], mode: str) -> bool:
    """Whether all programs end, from the dependencies of every event, as a fixed point over all of them.

    `host`, `device`, `started` and `ended` are what has happened to event number i of rank r.
    """
    members = {}  # of every event, the events of other ranks that it meets
    for record in made:
        for number, event in enumerate(record.events):
            members.setdefault(_meeting(made, record, number, event), []).append((record.rank, number))
    meets = {place: places for key, places in members.items() if key is not None for place in places}
    size = {place: _size(made[place[0]].events[place[1]]) for place in meets}
    host, device, started, ready = set(), set(), set(), set()
    everything = [(record.rank, number) for record in made for number in range(len(record.events))]

    def ended(place: tuple[int, int]) -> bool:
        return len(meets[place]) == size[place] and all(other in started for other in meets[place])

    def passes_host(rank: int, number: int) -> bool:
        event, place = made[rank].events[number], (rank, number)
        before = [(rank, i) for i in range(number) if isinstance(made[rank].events[i], Launch)]
        before = [place for place in before if made[rank].events[place[1]].group.axis != "control"]
        idle = (number == 0 or (rank, number - 1) in device) and all(ended(place) for place in before)
        if isinstance(event, NewGroup):
            ready.add(place)
            return len(meets[place]) == size[place] and all(other in ready for other in meets[place])
        if isinstance(event, HostSync):
            return idle or mode == "synchronous"
        if isinstance(event, Wait):
            launch = _launch(made[rank], event)
            return made[rank].events[launch].group.axis != "control" or ended((rank, launch))
        if mode == "synchronous":
            started.add(place)
            return ended(place)
        if event.group.axis == "control":
            started.add(place)
            return True
        same = [other for other in before if _stream(made[rank], other[1]) == _stream(made[rank], number)]
        if not same and idle:
            ready.add(place)
        firsts = [(r, i) for r in _sides(made, rank, event) if (i := _first(made[r], rank, event)) is not None]
        return bool(same) or (len(firsts) == len(_sides(made, rank, event)) and all(first in ready for first in firsts))

    def passes_device(rank: int, number: int) -> bool:
        event, place = made[rank].events[number], (rank, number)
        if mode == "synchronous":
            return True
        if isinstance(event, Wait):
            return ended((rank, _launch(made[rank], event)))
        if isinstance(event, Launch) and event.group.axis != "control":
            same = [i for i in range(number) if isinstance(made[rank].events[i], Launch)]
            free = all(ended((rank, i)) for i in same if _stream(made[rank], i) == _stream(made[rank], number))
            if free:
                started.add(place)
            return free or mode == "streams"
        return True

    def start_what_was_behind(rank: int, number: int) -> None:
        if isinstance(made[rank].events[number], Launch):
            passes_device(rank, number)

    before = -1
    while before != len(host) + len(device) + len(started) + len(ready):
        before = len(host) + len(device) + len(started) + len(ready)
        for rank, number in everything:
            place, previous = (rank, number), (rank, number - 1)
            if place not in host and (number == 0 or previous in host) and passes_host(rank, number):
                host.add(place)
            if place in device:
                start_what_was_behind(rank, number)
            elif place in host and (number == 0 or previous in device) and passes_device(rank, number):
                device.add(place)
    launches = [place for place in everything if isinstance(made[place[0]].events[place[1]], Launch)]
    return len(device) == len(everything) and all(ended(place) for place in launches)


def _meeting(made, record, number, event):
    """What an event meets others for, and for the how many-th time."""
    if isinstance(event, NewGroup):
        return ("make", event.group)
    if not isinstance(event, Launch):
        return None
    key = _key(record, event)
    same = [e for e in record.events[:number] if isinstance(e, Launch) and _key(record, e) == key]
    return (*key, len(same))


def _key(record, launch):
    sides = () if launch.peer is None else (record.rank, launch.peer)
    return (launch.group, sides if launch.kind == "send" else sides[::-1])


def _size(event) -> int:
    return 2 if isinstance(event, Launch) and event.peer is not None else len(event.group.ranks)


def _launch(record, wait) -> int:
    return next(i for i, e in enumerate(record.events) if isinstance(e, Launch) and e.number == wait.number)


def _stream(record, number):
    launch = record.events[number]
    return (launch.group, None if launch.peer is None else frozenset((record.rank, launch.peer)))


def _sides(made, rank, launch):
    return launch.group.ranks if launch.peer is None else (rank, launch.peer)


def _first(record, rank, launch):
    """The first use of the communicator of `launch` on another rank."""
    mine = (launch.group, None if launch.peer is None else frozenset((rank, launch.peer)))
    uses = (i for i, e in enumerate(record.events) if isinstance(e, Launch) and _stream(record, i) == mine)
    return next(uses, None)

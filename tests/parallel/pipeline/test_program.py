"""Where messages are placed, and that the checker rejects every program in which one could hang."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.parallel.pipeline.check import check_program, check_schedule
from engine.parallel.pipeline.program import Program, Step, StepKind, build_program
from engine.parallel.pipeline.schedules import (
    FORWARD_ONLY,
    SCHEDULES,
    Action,
    ActionKind,
    ScheduleError,
    build_schedule,
)
from engine.parallel.pipeline.simulate import simulate

KINDS = {"r": StepKind.RECEIVE, "s": StepKind.SEND}


def row(text: str) -> tuple[Step, ...]:
    """`rF1 F0 sF0`: post the receive of F1, compute F0, send its result."""
    steps = []
    for word in text.split():
        kind = KINDS.get(word[0], StepKind.COMPUTE)
        action, _, chunk = word.removeprefix(word[0] if word[0] in KINDS else "").partition(".")
        steps.append(Step(kind, Action(ActionKind(action[0]), int(action[1:]), int(chunk or 0))))
    return tuple(steps)


def one_f_one_b(*rows: str) -> Program:
    """A handmade program of 1F1B with two stages and four microbatches."""
    return Program(build_schedule("1f1b", 2, 4), tuple(map(row, rows)))


FIRST = "F0 sF0 F1 sF1 rB0 B0 F2 sF2 rB1 B1 F3 sF3 rB2 B2 rB3 B3"
LAST = "rF0 rF1 F0 B0 sB0 F1 rF2 B1 sB1 F2 rF3 B2 sB2 F3 B3 sB3"


def rejected(program: Program) -> str:
    with pytest.raises(ScheduleError) as caught:
        check_program(program)
    return str(caught.value)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from((*SCHEDULES, FORWARD_ONLY)))
    chunks = draw(st.integers(2, 3)) if name == "interleaved" else 1
    return build_program(build_schedule(name, draw(st.integers(2, 5)), draw(st.integers(1, 9)), chunks))


def test_1f1b_in_full():
    assert build_program(build_schedule("1f1b", 2, 4)) == one_f_one_b(FIRST, LAST)


def test_the_last_stages_of_three():
    _, middle, last = build_program(build_schedule("1f1b", 3, 3)).steps
    assert middle == row("rF0 rF1 F0 sF0 rF2 F1 sF1 rB0 B0 sB0 F2 sF2 rB1 B1 sB1 rB2 B2 sB2")
    assert last == row("rF0 rF1 F0 B0 sB0 F1 rF2 B1 sB1 F2 B2 sB2")


def test_one_stage_has_no_messages():
    program = check_schedule(build_schedule("gpipe", 1, 4))
    assert {step.kind for step in program.steps[0]} == {StepKind.COMPUTE}
    assert program.receives_ahead == 1


@settings(max_examples=60, deadline=None)
@given(programs())
def test_no_receive_is_posted_later_than_its_message_is_sent(program):
    """In the timeline with equal costs, where a receive is posted when the action before it ends."""
    ends = [{span.action: span.end for span in stage} for stage in simulate(program.schedule)]
    sent = {}  # by (receiving stage, chunk, microbatch, is forward)
    for stage, steps in enumerate(program.steps):
        for action in (step.action for step in steps if step.kind is StepKind.SEND):
            target = program.schedule.target(stage, action)
            sent[(*target, action.microbatch, action.kind is ActionKind.FORWARD)] = ends[stage][action]
    for stage, steps in enumerate(program.steps):
        posted = 0.0
        for step in steps:
            action = step.action
            if step.kind is StepKind.COMPUTE:
                posted = ends[stage][action]
            elif step.kind is StepKind.RECEIVE:
                message = (stage, action.chunk, action.microbatch, action.kind is ActionKind.FORWARD)
                assert posted <= sent[message] + 1e-9


def test_how_many_receives_are_posted_ahead():
    """At least one action before the one that needs them; over 1F1B only one of the two directions can be."""
    ahead = {name: build_program(build_schedule(name, 4, 32, 1 + (name == "interleaved"))).receives_ahead
             for name in (*SCHEDULES, FORWARD_ONLY)}  # fmt: skip
    assert {name: round(share, 2) for name, share in ahead.items()} == {
        "gpipe": 0.97, "1f1b": 0.48, "interleaved": 0.89, "zero_bubble": 0.95, FORWARD_ONLY: 0.97,
    }  # fmt: skip


def test_both_directions_posted_ahead_hang():
    """Stage 0 posts B1 before it computes F2, and stage 1 posts F2 before it computes B1.

    Each receive alone depends on nothing that its own stage has still to do.
    """
    first, last = FIRST.replace("F2 sF2 rB1 B1", "rB1 F2 sF2 B1"), LAST
    reason = "stage 0, B1 receives from stage 1; stage 1, F2 receives from stage 0"
    assert rejected(one_f_one_b(first, last)).endswith(f"stage 0, B1: deadlock: {reason}")
    check_program(one_f_one_b(first, LAST.replace("F1 rF2 B1 sB1", "F1 B1 sB1 rF2")))


def test_a_receive_that_depends_on_what_its_own_stage_has_still_to_do():
    assert "deadlock" in rejected(one_f_one_b(FIRST.replace("F0 sF0 F1 sF1 rB0", "rB0 F0 sF0 F1 sF1"), LAST))


def test_receives_that_are_only_posted_when_they_are_needed_hang():
    """Stage 0 sends F1 while stage 1 sends B0."""
    assert "deadlock" in rejected(one_f_one_b(FIRST, LAST.replace("rF0 rF1 F0 B0 sB0", "rF0 F0 B0 sB0 rF1")))


@settings(max_examples=60, deadline=None)
@given(programs(), st.data())
def test_a_dropped_or_repeated_message(program, data):
    stage = data.draw(st.integers(0, len(program.steps) - 1))
    steps = list(program.steps[stage])
    messages = [index for index, step in enumerate(steps) if step.kind is not StepKind.COMPUTE]
    index = data.draw(st.sampled_from(messages))
    repeated = [*steps[: index + 1], *steps[index:]]
    for corrupted in (steps[:index] + steps[index + 1 :], repeated):
        rows = (*program.steps[:stage], tuple(corrupted), *program.steps[stage + 1 :])
        with pytest.raises(ScheduleError):
            check_program(replace(program, steps=rows))


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        (FIRST.replace("rB1 B1", "B1 rB1"), LAST, "stage 0, B1: its receive is not posted before it"),
        (FIRST.replace("F1 sF1", "F1"), LAST, "stage 0, F1: its result is not sent where it is needed"),
        (FIRST.replace("B0 F2 sF2", "sF2 B0 F2"), LAST, "stage 0, F2: its result is not sent right after it"),
        (FIRST, LAST.replace("sB3", "sB3 sB3"), "stage 1, B3: its result is not sent right after it"),
        (FIRST, LAST.replace("rF0", "rB0 rF0"), "stage 1, B0: a receive of a message that does not exist"),
        (
            FIRST,
            LAST.replace("rF0 rF1", "rF1 rF0"),
            "stage 1, F1: its receive is posted where stage 0 sends",
        ),
    ],
)
def test_misplaced_messages(first, last, reason):
    assert reason in rejected(one_f_one_b(first, last))

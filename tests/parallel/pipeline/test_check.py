"""The checker rejects every corrupted schedule with a reason; simulated times are those worked out by hand.

`test_program.py` does the same for the messages of a schedule.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.parallel.pipeline.check import check_schedule
from engine.parallel.pipeline.schedules import (
    FORWARD_ONLY,
    SCHEDULES,
    Action,
    ActionKind,
    Schedule,
    ScheduleError,
    build_schedule,
)
from engine.parallel.pipeline.simulate import Costs, bubble_fraction, peak_activations, simulate


def action(text: str) -> Action:
    """`F3` or `F3.1`: what `str` of an action gives."""
    microbatch, _, chunk = text[1:].partition(".")
    return Action(ActionKind(text[0]), int(microbatch), int(chunk or 0))


def schedule(*rows: str, name: str = "handmade", num_microbatches: int, num_chunks: int = 1) -> Schedule:
    actions = tuple(tuple(map(action, row.split())) for row in rows)
    return Schedule(name, len(rows), num_microbatches, num_chunks, actions)


def rejected(corrupted: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(corrupted)
    error = caught.value
    assert f"schedule {corrupted.name}: stage {error.stage}, {error.action}: " in str(error)
    return error


@st.composite
def places(draw: st.DrawFn) -> tuple[Schedule, int, int]:
    """A schedule, a stage, and the index of one of its actions."""
    name = draw(st.sampled_from((*SCHEDULES, FORWARD_ONLY)))
    built = build_schedule(name, draw(st.integers(1, 5)), draw(st.integers(1, 9)), 2 if name == "interleaved" else 1)
    stage = draw(st.integers(0, built.num_stages - 1))
    return built, stage, draw(st.integers(0, len(built.actions[stage]) - 1))


def with_row(good: Schedule, stage: int, row: list[Action]) -> Schedule:
    actions = list(good.actions)
    actions[stage] = tuple(row)
    return replace(good, actions=tuple(actions))


def test_actions_are_written_briefly():
    assert [str(action(text)) for text in ("F3", "B0.1", "W12")] == ["F3", "B0.1", "W12"]


def test_the_error_is_one_of_the_configuration():
    assert issubclass(ScheduleError, ConfigError)


@settings(max_examples=60, deadline=None)
@given(places())
def test_a_dropped_action(place):
    good, stage, index = place
    row = list(good.actions[stage])
    dropped = row.pop(index)
    error = rejected(with_row(good, stage, row))
    assert (error.stage, error.action) == (stage, dropped)
    assert str(error).endswith("missing")


@settings(max_examples=60, deadline=None)
@given(places(), st.data())
def test_a_duplicated_action(place, data):
    good, stage, index = place
    row = list(good.actions[stage])
    duplicated = row[index]
    row.insert(data.draw(st.integers(0, len(row))), duplicated)
    error = rejected(with_row(good, stage, row))
    assert (error.stage, error.action) == (stage, duplicated)
    assert str(error).endswith("done 2 times")


@settings(max_examples=60, deadline=None)
@given(places(), st.booleans(), st.integers(-2, 1))
def test_an_action_on_what_does_not_exist(place, in_chunk, beyond):
    good, stage, index = place
    row = list(good.actions[stage])
    field, count = ("chunk", good.num_chunks) if in_chunk else ("microbatch", good.num_microbatches)
    row[index] = replace(row[index], **{field: count + beyond if beyond >= 0 else beyond})
    error = rejected(with_row(good, stage, row))
    assert (error.stage, error.action) == (stage, row[index])
    assert f"microbatches are 0 to {good.num_microbatches - 1}, chunks 0 to {good.num_chunks - 1}" in str(error)


@settings(max_examples=60, deadline=None)
@given(places())
def test_a_backward_that_comes_before_its_forward(place):
    good, stage, index = place
    row = list(good.actions[stage])
    needed = Action(ActionKind.FORWARD, row[index].microbatch, row[index].chunk)
    if row[index].kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
        moved = row.pop(index)
        row.insert(row.index(needed), moved)
        error = rejected(with_row(good, stage, row))
        assert (error.stage, error.action) == (stage, moved)
        assert str(error).endswith(f"comes before {needed}, which it needs")


def test_weight_gradients_that_come_before_input_gradients():
    error = rejected(schedule("F0 W0 I0", num_microbatches=1))
    assert "stage 0, W0: comes before I0, which it needs" in str(error)


@pytest.mark.parametrize("row", ["F0 B0 I0 W0", "F0 I0 B0 W0", "F0 I0 W0 B0"])
def test_a_backward_both_whole_and_split(row):
    assert "stage 1, B0: one too many; a backward is either B, or I and W" in str(
        rejected(schedule("F0 B0", row, num_microbatches=1))
    )


def test_a_backward_split_only_in_part():
    assert "stage 0, W0: missing" in str(rejected(schedule("F0 I0", num_microbatches=1)))
    assert "stage 0, I0: missing" in str(rejected(schedule("F0 W0", num_microbatches=1)))


def test_a_backward_may_be_split_for_some_microbatches():
    check_schedule(schedule("F0 F1 B0 I1 W1", "F0 I0 F1 B1 W0", num_microbatches=2))


def test_evaluation_has_no_backward():
    error = rejected(schedule("F0 B0", name=FORWARD_ONLY, num_microbatches=1))
    assert "stage 0, B0: one too many" in str(error)


def test_a_stage_without_actions():
    assert "stage 1, F0: missing" in str(rejected(schedule("F0 B0", "", num_microbatches=1)))


def test_stages_that_wait_for_each_other():
    error = rejected(schedule("F0 B0 F1 B1", "F0 F1 B0 B1", num_microbatches=2))
    reason = "stage 0, B0 needs a result of stage 1; stage 1, F1 needs a result of stage 0"
    assert str(error) == f"schedule handmade: stage 0, B0: deadlock: {reason}"


def test_chunks_of_one_stage_in_the_wrong_order():
    error = rejected(schedule("F0.1 F0 B0.1 B0", num_microbatches=1, num_chunks=2))
    assert "stage 0, F0.1: deadlock: stage 0, F0.1 needs a result of stage 0" in str(error)


def test_sends_that_run_far_ahead_have_their_receives_posted():
    """Stage 1 takes one microbatch after the other; it posts the receives of all that stage 0 sends meanwhile."""
    mixed = schedule("F0 F1 F2 F3 F4 F5 B0 B1 B2 B3 B4 B5", "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5", num_microbatches=6)
    program = check_schedule(mixed)
    assert " ".join(map(str, program.steps[1])).startswith(
        "receive F0 receive F1 compute F0 receive F2 receive F3 compute B0 send B0 receive F4 compute F1 receive F5"
    )


def test_messages_may_be_needed_in_another_order_than_sent():
    check_schedule(schedule("F0 F1 B0 B1", "F1 F0 B0 B1", num_microbatches=2))
    check_schedule(schedule("F0 F1 B1 B0", "F0 F1 B0 B1", num_microbatches=2))


def test_times_worked_out_by_hand():
    timeline = simulate(build_schedule("1f1b", 2, 1), Costs(1, 2, 3, send=0.5))
    assert [(span.start, span.end) for span in timeline[0]] == [(0, 1), (8, 13)]
    assert [(span.start, span.end) for span in timeline[1]] == [(1.5, 2.5), (2.5, 7.5)]
    assert bubble_fraction(timeline) == (13 - 6) / 6


def test_a_chunk_costs_its_share_of_a_stage():
    (spans,) = simulate(build_schedule("interleaved", 1, 1, 2), Costs(1, 2, 3, send=9))
    assert [(str(span.action), span.end) for span in spans] == [("F0", 0.5), ("F0.1", 1), ("B0.1", 3.5), ("B0", 6)]


def test_the_bubble_of_a_measured_timeline_starts_with_its_first_action():
    timeline = simulate(build_schedule("1f1b", 3, 4))
    later = tuple(tuple(replace(s, start=s.start + 7, end=s.end + 7) for s in spans) for spans in timeline)
    assert bubble_fraction(later) == pytest.approx(bubble_fraction(timeline)) == pytest.approx(2 / 4)


def test_activations_of_a_split_backward_are_held_until_its_weight_part():
    assert peak_activations(schedule("F0 F1 I0 F2 W0 I1 W1 I2 W2", num_microbatches=3)) == [3]
    assert peak_activations(schedule("F0 F1 B0 F2 B1 B2", num_microbatches=3)) == [2]

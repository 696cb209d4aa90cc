"""Every schedule runs, holds no more activations than its paper says, and idles exactly as long."""

import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.parallel.pipeline.check import check_schedule
from engine.parallel.pipeline.schedules import FORWARD_ONLY, SCHEDULES, Action, ActionKind, build_schedule
from engine.parallel.pipeline.simulate import Costs, Timeline, bubble_fraction, peak_activations, simulate

STAGES = st.integers(1, 16)
MICROBATCHES = st.integers(1, 64)
CHUNKS = st.integers(2, 4)  # of the interleaved schedule
TIMES = st.integers(1, 5)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A schedule's name and its stages, microbatches and chunks."""
    name = draw(st.sampled_from((*SCHEDULES, FORWARD_ONLY)))
    chunks = {"interleaved": CHUNKS, FORWARD_ONLY: st.integers(1, 4)}.get(name, st.just(1))
    return name, draw(STAGES), draw(MICROBATCHES), draw(chunks)


def rows(*arguments) -> list[str]:
    return [" ".join(map(str, actions)) for actions in build_schedule(*arguments).actions]


def idle(timeline: Timeline) -> float:
    """Time by which the step is longer than the computing of a stage."""
    busy = sum(span.end - span.start for span in timeline[0])
    return bubble_fraction(timeline) * busy


def test_gpipe_in_full():
    assert rows("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_in_full():
    assert rows("1f1b", 3, 4) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_interleaved_in_full():
    assert rows("interleaved", 2, 4, 2) == [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    ]


def test_interleaved_with_a_remainder_has_a_short_first_group():
    assert rows("interleaved", 2, 3, 2) == [
        "F0 F0.1 F1 F2 B0.1 F1.1 F2.1 B0 B1.1 B2.1 B1 B2",
        "F0 F0.1 B0.1 F1 F2 B0 F1.1 B1.1 F2.1 B2.1 B1 B2",
    ]


def test_zero_bubble_in_full():
    assert rows("zero_bubble", 3, 4) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_forward_only_in_full():
    assert rows(FORWARD_ONLY, 2, 3) == ["F0 F1 F2"] * 2
    assert rows(FORWARD_ONLY, 2, 3, 2) == ["F0 F0.1 F1 F2 F1.1 F2.1"] * 2


def test_neighbors_in_the_ring():
    schedule = build_schedule("interleaved", 3, 3, 2)
    forward, backward = Action(ActionKind.FORWARD, 1, 0), Action(ActionKind.BACKWARD, 1, 1)
    assert [schedule.source(stage, forward) for stage in range(3)] == [None, (0, 0), (1, 0)]
    assert [schedule.target(stage, forward) for stage in range(3)] == [(1, 0), (2, 0), (0, 1)]
    assert [schedule.source(stage, backward) for stage in range(3)] == [(1, 1), (2, 1), None]
    assert [schedule.target(stage, backward) for stage in range(3)] == [(2, 0), (0, 1), (1, 1)]
    weight = Action(ActionKind.BACKWARD_WEIGHT, 1, 1)
    assert {schedule.source(1, weight), schedule.target(1, weight)} == {None}


@pytest.mark.parametrize("name", (*SCHEDULES, FORWARD_ONLY))
def test_all_small_schedules_are_proven(name):
    chunks = {"interleaved": (2, 3), FORWARD_ONLY: (1, 2)}.get(name, (1,))
    for num_stages, num_microbatches, num_chunks in product(range(1, 5), range(1, 10), chunks):
        check_schedule(build_schedule(name, num_stages, num_microbatches, num_chunks))


@settings(max_examples=100, deadline=None)
@given(sizes())
def test_schedules_are_proven(size):
    check_schedule(build_schedule(*size))


@settings(max_examples=200, deadline=None)
@given(sizes())
def test_activations_in_flight(size):
    name, p, m, v = size
    peaks = peak_activations(build_schedule(*size))
    published = {
        "gpipe": [m] * p,
        "1f1b": [min(p - stage, m) for stage in range(p)],
        "interleaved": [min(2 * (p - 1 - stage) + (v - 1) * p + 1, m * v) for stage in range(p)],
        "zero_bubble": [min(p, m)] * p,
        FORWARD_ONLY: [0] * p,
    }[name]
    if name == "interleaved" and m % p:
        assert all(peak <= bound for peak, bound in zip(peaks, published, strict=True))
    else:
        assert peaks == published


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b"]), STAGES, MICROBATCHES, TIMES, TIMES, TIMES)
def test_bubble_of_gpipe_and_1f1b(name, p, m, forward, inputs, weights):
    timeline = simulate(build_schedule(name, p, m), Costs(forward, inputs, weights))
    assert bubble_fraction(timeline) == pytest.approx((p - 1) / m, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(STAGES, st.data(), CHUNKS, TIMES, TIMES, TIMES)
def test_bubble_of_the_interleaved_schedule(p, data, v, forward, inputs, weights):
    m = p * data.draw(st.integers(1, 64 // p))
    timeline = simulate(build_schedule("interleaved", p, m, v), Costs(forward, inputs, weights))
    assert bubble_fraction(timeline) == pytest.approx((p - 1) / (v * m), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(STAGES, MICROBATCHES, CHUNKS)
def test_a_remainder_is_no_slower_than_the_next_multiple(p, m, v):
    ends = [
        max(stage[-1].end for stage in simulate(build_schedule("interleaved", p, number, v)))
        for number in (m, m + -m % p)
    ]
    assert ends[0] <= ends[1] + 1e-9


@settings(max_examples=150, deadline=None)
@given(STAGES, MICROBATCHES, TIMES, TIMES, TIMES)
def test_bubble_of_the_zero_bubble_schedule(p, m, forward, inputs, weights):
    found = idle(simulate(build_schedule("zero_bubble", p, m), Costs(forward, inputs, weights)))
    published = (p - 1) * (forward + inputs - weights)
    if p > 1 and m >= p and weights > min(forward, inputs):
        assert found > published + 1e-9
    elif weights <= min(forward, inputs):
        assert found == pytest.approx(published + max(p - m, 0) * weights, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_never_idles(name):
    schedule = build_schedule(name, 1, 5, 2 if name == "interleaved" else 1)
    assert bubble_fraction(simulate(schedule)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "parallel.schedule = 2f2b; expected one of gpipe, 1f1b, interleaved, zero_bubble"),
        (("1f1b", 0, 2), "parallel.pp = 0"),
        (("1f1b", 2, 0), "number of microbatches = 0"),
        (("interleaved", 2, 2, 0), "parallel.virtual_stages = 0"),
        (("interleaved", 2, 2, 1), "raise parallel.virtual_stages, or choose parallel.schedule = 1f1b"),
        (("zero_bubble", 2, 2, 2), "set parallel.virtual_stages = 1, or choose parallel.schedule = interleaved"),
    ],
)
def test_what_a_schedule_does_not_admit(arguments, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        build_schedule(*arguments)


def test_schedules_need_no_torch():
    code = "import sys, engine.plan.timeline; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

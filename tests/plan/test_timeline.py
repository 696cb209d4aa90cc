"""Timelines as text and as pictures."""

import re
import sys

import pytest

from engine.errors import ConfigError
from engine.parallel.pipeline.program import build_program, posted_receives
from engine.parallel.pipeline.schedules import Action, ActionKind, build_schedule
from engine.parallel.pipeline.simulate import Costs, TimedAction, Timeline, simulate
from engine.plan.timeline import draw, text


def timeline(name: str, *sizes: int) -> Timeline:
    return simulate(build_schedule(name, *sizes))


def drawn(path, *timelines: tuple[str, Timeline]) -> str:
    draw(dict(timelines), path)
    return path.read_text(encoding="utf-8")


def test_text_of_1f1b():
    assert text(timeline("1f1b", 2, 3)).splitlines() == [
        "stage 0  F0 F1 .  .  B0--- F2 B1--- .  B2---",
        "stage 1  .  F0 B0--- F1 B1--- F2 B2--- .  .",
    ]


def test_text_of_a_split_backward():
    assert text(timeline("zero_bubble", 2, 2)).splitlines() == [
        "stage 0  F0 F1 .  I0 W0 I1 W1",
        "stage 1  .  F0 I0 F1 I1 W0 W1",
    ]


def test_text_of_posted_receives():
    """Several posted at once are one word; a long word moves what follows, which has a column of its own otherwise."""
    schedule = build_schedule("1f1b", 2, 3)
    times = simulate(schedule)
    assert text(times, posted_receives(build_program(schedule), times)).splitlines() == [
        "stage 0  F0 F1 .  .  B0--- F2 B1--- .  B2---",
        "receives       B0             B1    B2",
        "stage 1  .  F0 B0--- F1 B1--- F2 B2--- .  .",
        "receives F0,F1          F2",
    ]


def test_a_picture_of_posted_receives(tmp_path):
    schedule = build_schedule("1f1b", 2, 3)
    times = simulate(schedule)
    receives = posted_receives(build_program(schedule), times)
    without, path = drawn(tmp_path / "a.svg", ("one", times)), tmp_path / "b.svg"
    draw({"one": times}, path, {"one": receives})
    svg = path.read_text(encoding="utf-8")
    assert "<!-- posted receive, until needed -->" in svg and "posted receive" not in without
    assert (
        svg.count('<g id="line2d_') - without.count('<g id="line2d_') == 2 * (3 + 3) + 1
    )  # a line and its tick for each, one in the legend


def test_text_names_chunks():
    assert text(timeline("interleaved", 1, 1, 2)) == "stage 0  F0   F0.1 B0.1----- B0-------"


def test_text_of_many_stages_stays_aligned():
    starts = {row.index("F0") - 3 * stage for stage, row in enumerate(text(timeline("gpipe", 11, 1)).splitlines())}
    assert len(starts) == 1


def test_text_rounds_times_to_columns_of_the_shortest_action():
    action = Action(ActionKind.FORWARD, 0)
    short = tuple(TimedAction(action, start, start + 1) for start in (5.5, 6.5, 7.5))
    assert text((short, (TimedAction(action, 5.0, 7.6),))).splitlines() == [
        "stage 0  .  F0 F0 F0",
        "stage 1  F0------ .",
    ]


def test_a_picture_has_a_panel_per_title(tmp_path):
    """matplotlib writes each text of an SVG picture as a comment beside its outlines."""
    one, two = timeline("1f1b", 2, 3), timeline("zero_bubble", 2, 3)
    texts = re.findall(r"<!-- (.*?) -->", drawn(tmp_path / "new" / "both.svg", ("one", one), ("two", two)))
    assert "one: bubble 33.3%" in texts and "two: bubble 11.1%" in texts
    assert texts.count("stage 0") == texts.count("stage 1") == 2
    assert texts.count("2") >= 2 * 2 + 2 * 3  # the last microbatch's actions
    assert {"forward", "backward", "backward, inputs", "backward, weights"} <= set(texts)
    assert "lighter: later chunks" not in texts


def test_the_legend_explains_only_what_is_there(tmp_path):
    svg = drawn(tmp_path / "a.svg", ("one", timeline("interleaved", 2, 2, 2)))
    assert "<!-- lighter: later chunks -->" in svg
    assert "<!-- backward, weights -->" not in svg


def test_kinds_and_chunks_have_separate_colors(tmp_path):
    def fills(*sizes) -> set[str]:
        return set(re.findall(r"fill: (#\w+)", drawn(tmp_path / "a.svg", ("one", timeline(*sizes)))))

    background = fills("forward_only", 2, 2)
    assert len(fills("1f1b", 2, 2) - background) == 1
    assert len(fills("zero_bubble", 2, 2) - background) == 2
    assert len(fills("interleaved", 2, 2, 3) - background) == 1 + 2 * 2


def test_a_measured_timeline_starts_at_zero(tmp_path):
    """And boxes too narrow for their number stay empty."""
    action = Action(ActionKind.FORWARD, 77)
    spans = [TimedAction(action, 1000 + at, 1001 + at) for at in range(12)] + [TimedAction(action, 1012, 1012.01)]
    texts = re.findall(r"<!-- (.*?) -->", drawn(tmp_path / "a.svg", ("one", (tuple(spans),))))
    assert texts.count("77") == 12
    assert "0" in texts and not any(text.startswith("10") and text != "10" for text in texts)


def test_a_large_picture_leaves_numbers_out(tmp_path):
    draw({"one": simulate(build_schedule("interleaved", 16, 64, 4), Costs(send=0.1))}, tmp_path / "large.png")
    assert (tmp_path / "large.png").read_bytes().startswith(b"\x89PNG")


def test_a_kind_of_file_that_is_unknown(tmp_path):
    with pytest.raises(ConfigError, match=r"picture .*a\.doc: expected a name that ends in .*\.png"):
        draw({"one": timeline("1f1b", 2, 2)}, tmp_path / "a.doc")


def test_matplotlib_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        draw({"one": timeline("1f1b", 2, 2)}, tmp_path / "a.png")

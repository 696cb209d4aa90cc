"""Plots of pipeline timelines, simulated or measured, as an image or as text for a terminal.

A timeline lists the start and end of each action of each stage (`engine.parallel.pipeline.check`). Alternative
considered: a trace file for a browser's viewer, which cannot show several schedules on one time axis.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.parallel.pipeline.program import PostedReceive
from engine.parallel.pipeline.schedules import Action, ActionKind
from engine.parallel.pipeline.simulate import TimedAction, Timeline, bubble_fraction

Color = tuple[float, float, float]
Receives = Sequence[Sequence[PostedReceive]]  # per stage

_COLORS: dict[ActionKind, Color] = {
    ActionKind.FORWARD: (0.38, 0.58, 0.84),
    ActionKind.BACKWARD: (0.42, 0.70, 0.42),
    ActionKind.BACKWARD_INPUT: (0.22, 0.70, 0.68),
    ActionKind.BACKWARD_WEIGHT: (0.94, 0.67, 0.32),
}
_NAMES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward, inputs",
    ActionKind.BACKWARD_WEIGHT: "backward, weights",
}
_RECEIVE: Color = (0.75, 0.3, 0.35)
_TEXT = "0.5"  # gray that can be read on a white page and on a dark one; the image has no background
_IDLE = (0.5, 0.5, 0.5, 0.15)
_LIGHTEST = 0.6  # fraction of white in the last chunk's color
_BOX_INCHES, _ROW_INCHES = 0.2, 0.3
_MAX_INCHES = 24.0
_MIN_FONT, _MAX_FONT = 3.5, 9.0  # points; boxes too narrow for their number are not labeled
_DIGIT = 0.6  # width of a digit relative to the font size


def draw(timelines: Mapping[str, Timeline], path: Path, receives: Mapping[str, Receives] | None = None) -> None:
    """Draw one panel per timeline, stacked on a common time axis, and write the image to `path`.

    Stages are rows, and actions are boxes labeled with their microbatch; later chunks are lighter.

    Args:
        receives: posted receives of simulated timelines, by title; drawn as lines from the time at which they are
            posted to the action that needs the message.

    Raises:
        ConfigError: matplotlib is missing, or does not support the file type.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install matplotlib") from None
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise ConfigError(f"picture {path}: expected a name that ends in .{', .'.join(known)}")
    shown = [_from_zero(timeline) for timeline in timelines.values()]
    rows = [len(timeline) for timeline in shown]
    width, height = max(map(_inches, shown)), 0.8 + sum(0.5 + _ROW_INCHES * count for count in rows)
    figure = Figure((width, height), facecolor="none", layout=ConstrainedLayoutEngine(h_pad=0.08))
    panels = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    end = max(map(_end, shown))
    for panel, title, timeline in zip(panels, timelines, shown, strict=True):
        panel.set_title(
            f"{title}: bubble {bubble_fraction(timeline):.1%}", loc="left", fontsize=10, fontweight="bold", color=_TEXT
        )
        _draw_boxes(panel, timeline)
        _number_boxes(panel, timeline, points=0.93 * width * 72 / end)
        _draw_receives(panel, (receives or {}).get(title, ()))
    panels[-1].set(xlim=(0, end))
    panels[-1].set_xlabel("time", color=_TEXT)
    _add_legend(figure, [span.action for timeline in shown for span in _spans(timeline)], with_receives=bool(receives))
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"Description": description(timelines, receives)} if path.suffix in (".png", ".svg") else None
    figure.savefig(path, dpi=150, metadata=described)


def description(timelines: Mapping[str, Timeline], receives: Mapping[str, Receives] | None = None) -> str:
    """Render all timelines as text, each below its title; PNG and SVG images carry it as their description."""
    return "\n\n".join(f"{title}\n{text(shown, (receives or {}).get(title))}" for title, shown in timelines.items())


def text(timeline: Timeline, receives: Receives | None = None) -> str:
    """Render the timeline as text: one row per stage, one column per shortest action; dots are idle.

    With the `receives` of a simulated timeline, a second row per stage has them where they are posted.

    Times are rounded to columns. This is exact if all durations are multiples of the shortest, as in simulated
    timelines with equal costs; use `draw` for measured ones.
    """
    timeline = _from_zero(timeline)
    unit = min(span.end - span.start for span in _spans(timeline))
    width = 1 + max(len(str(span.action)) for span in _spans(timeline))
    num_columns = _column(_end(timeline), unit)
    rows = []
    for stage, spans in enumerate(timeline):
        cells = [".".ljust(width)] * num_columns
        for span in spans:
            first, last = _column(span.start, unit), _column(span.end, unit)
            box = str(span.action).ljust((last - first) * width - 1, "-" if last - first > 1 else " ") + " "
            cells[first:last] = [box] + [""] * (last - first - 1)
        label = f"stage {stage:<{len(str(len(timeline)))}}  "
        rows.append((label + "".join(cells)).rstrip())
        if receives is not None:
            rows.append(("receives".ljust(len(label)) + _receives_row(receives[stage], unit, width)).rstrip())
    return "\n".join(rows)


def _receives_row(receives: Sequence[PostedReceive], unit: float, width: int) -> str:
    """Those posted at the same time as one word, at its column or, if the word before is too long, behind it."""
    row = ""
    for posted, together in groupby(receives, key=lambda receive: receive.posted):
        row = row.ljust(_column(posted, unit) * width) + ",".join(str(receive.action) for receive in together) + " "
    return row


def _spans(timeline: Timeline) -> list[TimedAction]:
    return [span for spans in timeline for span in spans]


def _end(timeline: Timeline) -> float:
    return max(span.end for span in _spans(timeline))


def _from_zero(timeline: Timeline) -> Timeline:
    start = min(span.start for span in _spans(timeline))
    return tuple(
        tuple(TimedAction(span.action, span.start - start, span.end - start) for span in spans) for spans in timeline
    )


def _column(time: float, unit: float) -> int:
    return int(time / unit + 0.5)  # not `round`, which rounds 0.5 to 0 and 1.5 to 2


def _short(timeline: Timeline) -> float:
    """Return the 10th percentile of the durations: the shortest one, without the outliers of a measurement."""
    durations = sorted(span.end - span.start for span in _spans(timeline))
    return durations[len(durations) // 10]


def _inches(timeline: Timeline) -> float:
    """Return the width of the image, in inches, at which the labels of short boxes are readable."""
    return min(max(8.0, 0.8 + _BOX_INCHES * _end(timeline) / _short(timeline)), _MAX_INCHES)


def _draw_boxes(panel: Any, timeline: Timeline) -> None:
    from matplotlib.collections import PolyCollection

    last_chunk = max(span.action.chunk for span in _spans(timeline))
    boxes, colors = [], []
    for stage, spans in enumerate(timeline):
        top, bottom = stage - 0.42, stage + 0.42
        for span in spans:
            boxes.append([(span.start, top), (span.end, top), (span.end, bottom), (span.start, bottom)])
            colors.append(_lighter(_COLORS[span.action.kind], _LIGHTEST * span.action.chunk / max(last_chunk, 1)))
    panel.add_collection(PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=0.4))
    panel.set(ylim=(len(timeline) - 0.5, -0.5), facecolor=_IDLE)
    panel.set_yticks(range(len(timeline)), [f"stage {stage}" for stage in range(len(timeline))], fontsize=8)
    panel.tick_params(axis="both", color=_TEXT, labelcolor=_TEXT)
    panel.tick_params(axis="y", length=0)
    panel.spines[:].set_visible(False)


def _number_boxes(panel: Any, timeline: Timeline, points: float) -> None:
    """Label the boxes with microbatch numbers in one font size; `points` is the width of a unit of time."""
    digits = max(len(str(span.action.microbatch)) for span in _spans(timeline))
    size = min(points * _short(timeline) / (digits * _DIGIT + 0.2), _MAX_FONT)
    for stage, stage_spans in enumerate(timeline if size >= _MIN_FONT else ()):
        for span in stage_spans:
            number = str(span.action.microbatch)
            if len(number) * _DIGIT * size <= points * (span.end - span.start):
                panel.text((span.start + span.end) / 2, stage, number, fontsize=size, ha="center", va="center_baseline")


def _draw_receives(panel: Any, receives: Receives) -> None:
    """Lines below the boxes of each stage; forwards above backwards, and a tick where the receive is posted."""
    for stage, posted in enumerate(receives):
        for receive in posted:
            below = stage + (0.445 if receive.action.kind is ActionKind.FORWARD else 0.485)
            panel.plot(
                [receive.posted, receive.needed], [below, below], color=_RECEIVE, linewidth=0.8, solid_capstyle="butt"
            )
            panel.plot([receive.posted], [below], color=_RECEIVE, marker="|", markersize=3.5, markeredgewidth=0.8)


def _lighter(color: Color, white: float) -> Color:
    red, green, blue = (white + (1 - white) * part for part in color)
    return red, green, blue


def _add_legend(figure: Any, actions: list[Action], *, with_receives: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {action.kind for action in actions}
    patches: list[Any] = [Patch(color=_COLORS[kind], label=_NAMES[kind]) for kind in ActionKind if kind in kinds]
    if any(action.chunk for action in actions):
        patches.append(Patch(color=_lighter(_COLORS[ActionKind.FORWARD], _LIGHTEST), label="lighter: later chunks"))
    if with_receives:
        patches.append(Line2D([], [], color=_RECEIVE, linewidth=0.8, marker="|", label="posted receive, until needed"))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9, labelcolor=_TEXT
    )

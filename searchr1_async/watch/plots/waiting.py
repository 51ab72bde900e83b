"""Timeline chart of a step: episodes by stage above, trainer activity below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from searchr1_async.watch.plots.theme import (
    CALLS,
    FAINT,
    HELD_OUT,
    NOTE_COLOUR,
    SEEN,
    TRAINING,
    TURNS,
    WIDTH,
    axis,
    empty_chart,
    heading,
    legend,
    table,
    values_axis,
)
from searchr1_async.watch.plots.timeline import STAGES, Timeline, joined, step_summary, timeline_of
from searchr1_async.watch.trackers.lines import LoggedEvent

if TYPE_CHECKING:
    import altair as alt

_STAGE_COLOURS = (TRAINING, "#a9c3e6", SEEN, FAINT)
_TRAINER_COLOURS = {"learning": TURNS, "stepping": CALLS, "idle": FAINT}
_MARK_COLOURS = {"group finished": NOTE_COLOUR, "group dropped": HELD_OUT, "weights published": CALLS}
_MAX_SAMPLES, _MAX_SPANS, _MAX_MARKS = 500, 600, 1200
"""Samples take five rows each: at most 4,300 rows in total."""


def plot_timeline(
    events: Iterable[LoggedEvent],
    step: int | None = None,
    *,
    title: str | None = None,
    width: int = WIDTH,
    height: int = 170,
) -> alt.VConcatChart | alt.Chart:
    """Timeline of one step: what episodes and the trainer waited for.

    Args:
        events: the run's log, as from :func:`searchr1_async.watch.trackers.read_events`.
        step: counted from 1; None for the last step with published weights.
        title: None names the step.
        width: in pixels.
        height: of the upper panel, in pixels.
    """
    import altair as alt

    timeline = timeline_of(events, step)
    if timeline is None or timeline.seconds <= 0:
        which = "No step has started yet" if step is None else f"The run's event log has nothing on step {step}"
        return empty_chart(f"{which}: nothing to draw.", title=title or "timeline of a step")
    text = title if title is not None else f"step {timeline.step}: who waited for what"
    x = alt.Scale(domain=[0, timeline.seconds], nice=False)
    upper = _stages(timeline, x).properties(width=width, height=height, title=heading(text, step_summary(timeline)))
    lower = _trainer(timeline, x).properties(width=width, height=72)
    return alt.vconcat(upper, lower, spacing=6).resolve_scale(color="independent", shape="independent")


def _stages(timeline: Timeline, x: alt.Scale) -> alt.Chart | alt.LayerChart:
    import altair as alt

    samples = joined(timeline.samples, _MAX_SAMPLES)
    if not samples:
        return empty_chart("The log has no rollout samples for this step.")
    ends = [second for second, _ in samples[1:]] + [timeline.seconds]
    held = [
        {"second": round(second, 3), "end": round(end, 3)} | {stage: round(counts[stage], 2) for stage in STAGES}
        for (second, counts), end in zip(samples, ends, strict=True)
    ]
    rows: list[dict[str, Any]] = [
        {"second": round(second, 3), "stage": stage, "order": order, "episodes": round(counts[stage], 2)}
        for second, counts in [*samples, (timeline.seconds, samples[-1][1])]
        for order, stage in enumerate(STAGES)
    ]
    colour = alt.Color("stage:N", scale=alt.Scale(domain=list(STAGES), range=list(_STAGE_COLOURS)), legend=legend())
    y_axis = values_axis("episodes in flight", minExtent=44, tickCount=5, tickMinStep=1, format="~s")
    place = alt.X("second:Q", scale=x, axis=axis(None, labels=False, grid=False))
    areas = (
        alt.Chart(table(rows))
        .mark_area(interpolate="step-after", opacity=0.95)
        .encode(x=place, y=alt.Y("episodes:Q", stack="zero", axis=y_axis), color=colour, order=alt.Order("order:Q"))
    )
    # An area's tooltip only shows one stage at a neighbouring sample; these invisible rectangles show all stages.
    tips = (
        alt.Chart(table(held))
        .mark_rect(opacity=0)
        .encode(
            x=place,
            x2="end:Q",
            tooltip=[alt.Tooltip("second:Q", title="second", format=".1f")]
            + [alt.Tooltip(f"{stage}:Q", format=",.4~g") for stage in STAGES],
        )
    )
    return cast("alt.LayerChart", alt.layer(areas, tips))


def _trainer(timeline: Timeline, x: alt.Scale) -> alt.LayerChart:
    import altair as alt

    lanes = ["trainer", "groups", "weights"]
    y = alt.Y(
        "lane:N",
        sort=lanes,
        scale=alt.Scale(domain=lanes),
        axis=axis(None, grid=False, domain=False, ticks=False, minExtent=44),
    )
    spans = [
        {"lane": "trainer", "start": round(s.start, 3), "end": round(s.end, 3), "state": s.state, "seconds": round(s.seconds, 3)}
        for s in _longest(timeline)
    ]  # fmt: skip
    place = alt.X(
        "start:Q", scale=x, axis=axis("seconds since the batch was opened", grid=False, tickCount=8, format=",.4~g")
    )
    bars = (
        alt.Chart(table(spans))
        .mark_bar(height=14)
        .encode(
            x=place, x2="end:Q", y=y,
            color=alt.Color("state:N", legend=legend(orient="bottom"),
                            scale=alt.Scale(domain=list(_TRAINER_COLOURS), range=list(_TRAINER_COLOURS.values()))),
            tooltip=[
                alt.Tooltip("state:N", title="trainer"),
                alt.Tooltip("start:Q", title="from second", format=".2f"),
                alt.Tooltip("seconds:Q", title="for seconds", format=".2f"),
            ],
        )
    )  # fmt: skip
    marks = [
        {"lane": "weights" if mark.what == "weights published" else "groups", "second": round(mark.second, 3),
         "what": mark.what, "detail": mark.detail}
        for mark in _some(timeline)
    ]  # fmt: skip
    ticks = (
        alt.Chart(table(marks))
        .mark_tick(thickness=1.8, size=14, opacity=0.85)
        .encode(
            x=alt.X("second:Q", scale=x), y=y,
            color=alt.Color("what:N", legend=legend(orient="bottom"),
                              scale=alt.Scale(domain=list(_MARK_COLOURS), range=list(_MARK_COLOURS.values()))),
            tooltip=[alt.Tooltip("what:N", title="what"), alt.Tooltip("detail:N", title="of"),
                     alt.Tooltip("second:Q", title="second", format=".2f")],
        )
    )  # fmt: skip
    return cast("alt.LayerChart", alt.layer(bars, ticks)).resolve_scale(color="independent")


def _longest(timeline: Timeline) -> list[Any]:
    """All spans, or the longest if there are too many (the others are thinner than a pixel)."""
    if len(timeline.spans) <= _MAX_SPANS:
        return list(timeline.spans)
    kept = sorted(timeline.spans, key=lambda span: span.seconds, reverse=True)[:_MAX_SPANS]
    return sorted(kept, key=lambda span: span.start)


def _some(timeline: Timeline) -> list[Any]:
    """All marks; if there are too many, all published weights and every n-th of the others."""
    if len(timeline.marks) <= _MAX_MARKS:
        return list(timeline.marks)
    rare = [mark for mark in timeline.marks if mark.what == "weights published"][:_MAX_MARKS]
    others = [mark for mark in timeline.marks if mark.what != "weights published"]
    every = -(-len(others) // max(1, _MAX_MARKS - len(rare)))
    return [*rare, *others[::every]]

"""Timeline of one step from the event log: what episodes and the trainer waited for, and its chart.

The timeline is pure; :func:`plot_timeline` draws episodes by stage above the trainer's activity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from searchr1_async.trackers.tracker import LoggedEvent, session_events, steps_of
from searchr1_async.watch.chart_parts import (
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

if TYPE_CHECKING:
    import altair as alt

STAGES = ("sampling", "queued", "searching", "in between")
"""Stages of an episode in flight: at the model, waiting for it, at the search, or between two of these."""


@dataclass(frozen=True, slots=True)
class Span:
    """A period of one trainer state, in seconds since the batch was opened."""

    start: float
    end: float
    state: str
    """``idle``, ``learning`` (minibatch gradients) or ``stepping`` (optimiser step and publishing weights)."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Mark:
    """An event at one moment."""

    second: float
    what: str
    """``group finished``, ``group dropped`` or ``weights published``."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step, from opening its batch to publishing its weights."""

    step: int
    seconds: float
    is_over: bool
    """Its weights are published; otherwise the timeline ends with the events."""
    samples: tuple[tuple[float, Mapping[str, float]], ...]
    """Second, and episodes by stage from then on."""
    spans: tuple[Span, ...]
    """Trainer states, without gaps."""
    marks: tuple[Mark, ...]

    def trainer_share(self, state: str) -> float:
        """Fraction of the step's time."""
        return sum(span.seconds for span in self.spans if span.state == state) / self.seconds if self.seconds else 0.0

    def stage_shares(self) -> dict[str, float]:
        """Fractions of the total episode time in the step; empty without samples."""
        ends = [second for second, _ in (*self.samples, (self.seconds, None))][1:]
        spent = dict.fromkeys(STAGES, 0.0)
        for (start, counts), end in zip(self.samples, ends, strict=True):
            for stage in STAGES:
                spent[stage] += counts[stage] * (end - start)
        total = sum(spent.values())
        return {stage: value / total for stage, value in spent.items()} if total else {}


def timeline_of(events: Iterable[LoggedEvent], step: int | None = None) -> Timeline | None:
    """A step's timeline; None if the events have no such step.

    Args:
        events: a run's event log, with all sessions. Of a step that a resumed run redid, the last session counts.
        step: counted from 1; None for the last step with published weights, else the first step.
    """
    log = list(events)
    session = session_events(log, step)
    if step is None:
        published = [event.values["step"] for event in _named(session, "WeightsPublished") if event.values["step"] > 0]
        steps = [number for number in steps_of(session) if number > 0]
        step = max((number for number in published if number in steps), default=steps[0] if steps else None)
    if step is None or not session:
        return None
    start = _opened(session, step)
    if start is None:
        return None
    end, is_over = _published(session, step)
    end = max(end, start)
    samples = tuple(_samples(session, start, end))
    return Timeline(
        step, end - start, is_over, samples, tuple(_spans(session, start, end)), tuple(_marks(session, start, end))
    )


def _named(events: Iterable[LoggedEvent], *names: str) -> list[LoggedEvent]:
    return [event for event in events if event.name in names]


def _opened(session: Sequence[LoggedEvent], step: int) -> float | None:
    """When the batch was opened: from ``PipelineChanged``, else when the previous one closed or training started.

    On-policy, its rollouts only start once the previous step's weights are published.
    """
    if _staleness(session) == 0:
        for event in _named(session, "WeightsPublished"):
            if event.values.get("step") == step - 1:
                return event.time
    for event in session:
        if event.name == "PipelineChanged" and event.values.get("step") == step:
            return event.time
    closed = [event.time for event in _named(session, "BatchClosed") if event.values.get("step") == step - 1]
    if closed:
        return closed[-1]
    began = [event.time for event in _named(session, "PhaseStarted") if event.values.get("phase") == "train"]
    is_first = min(steps_of(session), default=step) == step
    if is_first and began:
        return began[-1]
    return next((event.time for event in session if event.values.get("step") == step), None)


def _staleness(session: Sequence[LoggedEvent]) -> object:
    """``max_staleness`` of the run; None if unknown."""
    settings = next((event.values.get("settings") for event in _named(session, "RunStarted")), None)
    pipeline = settings.get("pipeline") if isinstance(settings, Mapping) else None
    return pipeline.get("max_staleness") if isinstance(pipeline, Mapping) else None


def _published(session: Sequence[LoggedEvent], step: int) -> tuple[float, bool]:
    for name in ("WeightsPublished", "StepFinished"):
        for event in _named(session, name):
            if event.values.get("step") == step:
                return event.time, True
    return session[-1].time, False


def _samples(session: Sequence[LoggedEvent], start: float, end: float) -> Iterable[tuple[float, Mapping[str, float]]]:
    """Episodes by stage; the last sample before the start is used at the start."""
    before: Mapping[str, float] | None = None
    started = False
    for event in _named(session, "RolloutSampled"):
        if event.time > end:
            break
        counts = _by_stage(event.values)
        if event.time <= start:
            before = counts
            continue
        if not started and before is not None:
            yield 0.0, before
        started = True
        yield event.time - start, counts
    if not started and before is not None:
        yield 0.0, before


def _by_stage(values: Mapping[str, float]) -> dict[str, float]:
    counts = {stage: float(values.get(stage, 0)) for stage in STAGES[:3]}
    return counts | {"in between": max(0.0, float(values.get("episodes", 0)) - sum(counts.values()))}


def _spans(session: Sequence[LoggedEvent], start: float, end: float) -> Iterable[Span]:
    """Trainer states between all changes; equal neighbours are merged."""
    changes = sorted([*_learning_changes(session), *_stepping_changes(session)])
    learning = stepping = 0
    at, state = start, "idle"
    spans: list[Span] = []
    for moment, is_learning, change in [*changes, (end, False, 0)]:
        until = min(max(moment, start), end)
        if until > at:
            if spans and spans[-1].state == state:
                spans[-1] = Span(spans[-1].start, until - start, state)
            else:
                spans.append(Span(at - start, until - start, state))
            at = until
        learning, stepping = learning + (change if is_learning else 0), stepping + (0 if is_learning else change)
        state = "learning" if learning > 0 else "stepping" if stepping > 0 else "idle"
    return spans


def _learning_changes(session: Sequence[LoggedEvent]) -> Iterable[tuple[float, bool, int]]:
    """A minibatch is open until its gradient arrives, or at the latest until its batch's weights are published."""
    open_of_step: dict[int, int] = {}
    for event in _named(session, "MinibatchSubmitted", "MinibatchLearned", "WeightsPublished"):
        step = event.values.get("step", 0)
        if event.name == "MinibatchSubmitted":
            open_of_step[step] = open_of_step.get(step, 0) + 1
            yield event.time, True, 1
        elif event.name == "MinibatchLearned" and open_of_step.get(step, 0):
            open_of_step[step] -= 1
            yield event.time, True, -1
        elif event.name == "WeightsPublished":
            for _ in range(open_of_step.pop(step, 0)):
                yield event.time, True, -1


def _stepping_changes(session: Sequence[LoggedEvent]) -> Iterable[tuple[float, bool, int]]:
    closed: set[int] = set()
    for event in _named(session, "BatchClosed", "WeightsPublished"):
        step = event.values.get("step", 0)
        if event.name == "BatchClosed" and step not in closed:
            closed.add(step)
            yield event.time, False, 1
        elif event.name == "WeightsPublished" and step in closed:
            closed.remove(step)
            yield event.time, False, -1


def _marks(session: Sequence[LoggedEvent], start: float, end: float) -> Iterable[Mark]:
    for event in session:
        if not start <= event.time <= end:
            continue
        second, values = event.time - start, event.values
        if event.name == "GroupFinished":
            yield Mark(second, "group finished", _versions(values))
        elif event.name == "GroupDropped":
            yield Mark(second, "group dropped", str(values.get("reason", "")))
        elif event.name == "WeightsPublished":
            yield Mark(second, "weights published", f"after step {values.get('step')}")


def _versions(values: Mapping[str, object]) -> str:
    versions = values.get("policy_versions")
    return f"weights of step {', '.join(map(str, versions))}" if isinstance(versions, list) and versions else ""


def step_summary(timeline: Timeline) -> list[str]:
    """One or two lines on what the trainer and the episodes waited for."""
    seconds = _seconds(timeline.seconds)
    trainer = f"the trainer was idle {timeline.trainer_share('idle'):.0%} of {seconds}"
    busy = [
        f"{doing} {timeline.trainer_share(state):.0%}"
        for state, doing in (("learning", "learning"), ("stepping", "updating weights"))
        if timeline.trainer_share(state) >= 0.005
    ]
    lines = [", ".join([trainer, *busy]) + ("" if timeline.is_over else " (in progress)")]
    if shares := timeline.stage_shares():
        names = {"sampling": "sampling", "queued": "in the sampling queue", "searching": "searching"}
        parts = [f"{shares[stage]:.0%} {name}" for stage, name in names.items() if shares[stage] >= 0.005]
        if parts:
            lines.append(f"episode time: {', '.join(parts)}")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def joined(samples: Sequence[tuple[float, Mapping[str, float]]], most: int) -> list[tuple[float, Mapping[str, float]]]:
    """At most ``most`` samples: neighbours are merged into their time-weighted mean."""
    if len(samples) <= most:
        return list(samples)
    size = -(-len(samples) // most)
    out: list[tuple[float, Mapping[str, float]]] = []
    for place in range(0, len(samples), size):
        chunk = samples[place : place + size + 1]
        held = [max(later - earlier, 1e-9) for (earlier, _), (later, _) in pairwise(chunk)] or [1.0]
        kept = chunk[: len(held)]
        total = sum(held)
        means = {stage: sum(c[stage] * t for (_, c), t in zip(kept, held, strict=True)) / total for stage in STAGES}
        out.append((chunk[0][0], means))
    return out


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
        events: the run's log, as from :func:`searchr1_async.trackers.read_events`.
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

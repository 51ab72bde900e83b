"""Timeline of one step from the event log: what episodes and the trainer waited for, and its chart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.trackers.tracker import LoggedEvent
from searchr1_async.watch.drawing import (
    CALLS,
    FAINT,
    SEEN,
    TRAINING,
    TURNS,
    WIDTH,
    axis,
    empty_chart,
    heading,
    legend,
    thinned,
    tooltips,
    values_axis,
)
from searchr1_async.watch.markup import duration

if TYPE_CHECKING:
    import altair as alt

STAGES = ("sampling", "queued", "searching", "in between")
"""Stages of an episode in flight: at the model, waiting for it, at the search, or between two of these."""
STATES = ("learning", "stepping", "idle")
"""Of the trainer: gradients of minibatches; the optimizer's step and publishing; neither."""
_MOST = 600
"""Maximum samples (four rows each) and spans in a chart."""
_FIELDS: dict[str, Any] = {"step": pl.Int64, "trainer": pl.String} | dict.fromkeys(
    ("episodes", *STAGES[:3]), pl.Float64
)
"""Of an event, what the timeline reads."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step, from opening its batch to publishing its weights. Times are in seconds since the opening."""

    step: int
    seconds: float
    is_over: bool
    """Its weights are published; otherwise the timeline ends with the events."""
    stages: pl.DataFrame
    """``start`` and ``end``, and the number of episodes in each of the :data:`STAGES`."""
    trainer: pl.DataFrame
    """``start``, ``end`` and ``state``, without gaps."""


def timeline_of(events: Iterable[LoggedEvent], step: int | None = None) -> Timeline | None:
    """A step's timeline; None if the events have no such step.

    Args:
        events: a run's event log, with all sessions. Of a step that a resumed run redid, the last session counts.
        step: counted from 1; None for the last step with published weights, else the first step.
    """
    log = _frame(events)
    changes, published = log.filter(event="PipelineChanged"), log.filter(event="WeightsPublished")
    opened: list[int] = changes["step"].to_list()
    if step is None:
        step = next((each for each in reversed(published["step"].to_list()) if each in opened), min(opened, default=0))
    if step not in opened:
        return None
    last = changes.filter(step=step)["session"].max()
    session, published = log.filter(session=last), published.filter(session=last)
    start = changes.filter(step=step, session=last)["time"][0]
    if session["max_staleness"][0] == 0:
        # On-policy, the rollouts only start once the previous step's weights are published.
        start = next(iter(published.filter(step=step - 1)["time"]), start)
    ends = published.filter(step=step)["time"]
    end = max(start, ends[0] if ends.len() else session["time"][-1])
    # What holds at the start came before it.
    session = session.filter(pl.col("time") <= end).with_columns(start=(pl.col("time") - start).clip(0.0))
    return Timeline(step, end - start, bool(ends.len()), _stages(session, end - start), _trainer(session, end - start))


def _frame(events: Iterable[LoggedEvent]) -> pl.DataFrame:
    """The log as a table. Notices and phases at its end may be of the next session's start, so they are left out."""
    rows = []
    for event in events:
        if not event.name.startswith(("Notice", "Phase")):
            pipeline = (event.values.get("settings") or {}).get("pipeline") or {}
            known = {"time": event.time, "event": event.name, "max_staleness": pipeline.get("max_staleness")}
            rows.append(known | {name: event.values.get(name) for name in _FIELDS})
    schema: dict[str, Any] = {"time": pl.Float64, "event": pl.String, "max_staleness": pl.Int64, **_FIELDS}
    # Each process begins with RunStarted.
    return pl.DataFrame(rows, schema=schema).with_columns(session=(pl.col("event") == "RunStarted").cum_sum())


def _spans(frame: pl.DataFrame, seconds: float) -> pl.DataFrame:
    """Each row holds until the next one; of several at one time, the last."""
    last = frame.unique("start", keep="last", maintain_order=True)
    return last.with_columns(end=pl.col("start").shift(-1, fill_value=seconds)).filter(pl.col("end") > pl.col("start"))


def _stages(session: pl.DataFrame, seconds: float) -> pl.DataFrame:
    others = (pl.col("episodes") - pl.sum_horizontal(STAGES[:3])).clip(0.0)
    spans = _spans(session.filter(event="RolloutSampled"), seconds)
    return spans.select("start", "end", *STAGES[:3], others.alias(STAGES[3]))


def _trainer(session: pl.DataFrame, seconds: float) -> pl.DataFrame:
    idle = pl.DataFrame({"start": [0.0], "state": ["idle"]})
    changes = session.filter(event="PipelineChanged").select("start", state="trainer")
    spans = _spans(pl.concat([idle, changes]), seconds)
    spans = _spans(spans.filter(pl.col("state").ne_missing(pl.col("state").shift())), seconds)
    return spans.select("start", "end", "state")


def trainer_shares(timeline: Timeline) -> dict[str, float]:
    """Fractions of the step's time by trainer state."""
    spent = timeline.trainer.group_by("state").agg(
        (pl.col("end") - pl.col("start")).sum() / max(timeline.seconds, 1e-9)
    )
    return dict.fromkeys(STATES, 0.0) | dict(spent.iter_rows())


def stage_shares(timeline: Timeline) -> dict[str, float]:
    """Fractions of the total episode time in the step; empty without samples."""
    spent = timeline.stages.select((pl.col(STAGES) * (pl.col("end") - pl.col("start"))).sum()).row(0, named=True)
    total = sum(spent.values())
    return {stage: value / total for stage, value in spent.items()} if total else {}


def step_summary(timeline: Timeline) -> list[str]:
    """One or two lines on what the trainer and the episodes waited for."""
    trainer = ", ".join(f"{state} {share:.0%}" for state, share in trainer_shares(timeline).items())
    lines = [f"trainer, of {duration(timeline.seconds)}: {trainer}" + ("" if timeline.is_over else " (in progress)")]
    if shares := stage_shares(timeline):
        lines.append(f"episodes: {', '.join(f'{stage} {share:.0%}' for stage, share in shares.items())}")
    return lines


def plot_timeline(events: Iterable[LoggedEvent], step: int | None = None) -> alt.VConcatChart | alt.Chart:
    """Timeline of one step: what episodes and the trainer waited for.

    Args:
        events: the run's log, as from :func:`searchr1_async.trackers.read_events`.
        step: counted from 1; None for the last step with published weights.
    """
    import altair as alt

    timeline = timeline_of(events, step)
    if timeline is None or timeline.seconds <= 0:
        which = "No step has started yet" if step is None else f"The run's event log has nothing on step {step}"
        return empty_chart(f"{which}: nothing to draw.", title="timeline of a step")
    title = heading(f"step {timeline.step}: who waited for what", step_summary(timeline))
    scale = alt.Scale(domain=[0, timeline.seconds], nice=False)
    colours = alt.Scale(domain=list(STATES), range=[TURNS, CALLS, FAINT])
    place = axis("seconds since the batch was opened", grid=False, tickCount=8, format=",.4~g")
    # Of too many spans the longest: the others are thinner than a pixel.
    spans = timeline.trainer.with_columns(seconds=pl.col("end") - pl.col("start")).top_k(_MOST, by="seconds")
    trainer = alt.Chart(spans.with_columns(pl.exclude("state").round(3), what=pl.lit("trainer")))
    lower = trainer.mark_bar(height=14).encode(
        x=alt.X("start:Q", scale=scale, axis=place),
        x2="end:Q",
        y=alt.Y("what:N", axis=axis(None, grid=False, domain=False, ticks=False, minExtent=44)),
        color=alt.Color("state:N", legend=legend(orient="bottom"), scale=colours),
        tooltip=tooltips("state:N|trainer", "start|from second|.2f", "seconds|for seconds|.2f"),
    )
    upper = _stages_chart(timeline, scale).properties(width=WIDTH, height=170, title=title)
    return alt.vconcat(upper, lower.properties(width=WIDTH, height=24), spacing=6).resolve_scale(color="independent")


def _stages_chart(timeline: Timeline, x: alt.Scale) -> alt.Chart:
    import altair as alt

    if not timeline.stages.height:
        return empty_chart("The log has no rollout samples for this step.")
    last = timeline.stages.tail(1).with_columns(start=pl.lit(timeline.seconds))
    samples = thinned(pl.concat([timeline.stages, last]), _MOST).with_columns(second=pl.col("start").round(3))
    rows = samples.unpivot(STAGES, index="second", variable_name="stage", value_name="episodes")
    order = pl.col("stage").replace_strict({stage: place for place, stage in enumerate(STAGES)})
    colours = alt.Scale(domain=list(STAGES), range=[TRAINING, "#a9c3e6", SEEN, FAINT])
    y_axis = values_axis("episodes in flight", minExtent=44, tickCount=5, tickMinStep=1, format="~s")
    areas = alt.Chart(rows.with_columns(order=order)).mark_area(interpolate="step-after", opacity=0.95)
    return areas.encode(
        x=alt.X("second:Q", scale=x, axis=axis(None, labels=False, grid=False)),
        y=alt.Y("episodes:Q", stack="zero", axis=y_axis),
        color=alt.Color("stage:N", scale=colours, legend=legend()),
        order=alt.Order("order:Q"),
        tooltip=tooltips("second|second|.1f", "stage:N|stage", "episodes||,d"),
    )

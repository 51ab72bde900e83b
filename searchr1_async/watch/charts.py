"""Charts of a run as Altair objects, to adjust, concatenate, or save as PNG or SVG: :func:`draw`, which ``run.plot(kind)`` calls.

The charts of outcomes are here, with their frames: reward and exact match by number of turns, and exact match by suite. Altair is
imported on first use.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.signals import in_kernel
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.metrics import CURVES
from searchr1_async.records.run_records import RunRecords
from searchr1_async.records.statistics import Z_95, mean_interval, wilson_interval
from searchr1_async.trackers.tracker import EVENTS_FILE, read_events
from searchr1_async.watch.drawing import (
    GREY,
    HEIGHT,
    NO_STEP,
    NOTE_COLOUR,
    SEEN,
    TRAINING,
    WIDTH,
    axis,
    empty_chart,
    enable_renderer,
    heading,
    legend,
    live_chart,
    plot_learning,
    plot_metric,
    small_png,
    table,
    thinned,
    tooltips,
    values_axis,
)
from searchr1_async.watch.markup import shown
from searchr1_async.watch.state import ALL_SUITES
from searchr1_async.watch.timeline import plot_timeline

if TYPE_CHECKING:
    import altair as alt

    Chart = alt.Chart | alt.LayerChart | alt.ConcatChart | alt.VConcatChart

MAX_EVALUATIONS = 8
"""Maximum evaluations drawn per suite; of more, the first, the last and an even selection between them."""


def draw(run: RunRecords | Path | str, kind: str = "learning", *, step: int | None = None) -> Chart:
    """A chart of a running or finished run as an Altair object: adjust it, concatenate it (``a | b``), or save it with
    ``chart.save("chart.png")`` or ``.svg``. Without data it is a chart that says so.

    Args:
        run: its records or its folder.
        kind: ``learning`` (reward, exact match, turns, valid calls), ``timeline``, ``reward_by_turns``, ``suites``; or a metric
            (``reward``, ``exact_match``, ``turns``, ``valid_calls``, any column of ``run.metrics``).
        step: of the timeline, counted from 1; None for the last step with published weights.

    Raises:
        ConfigurationError: an unknown kind or metric.
    """
    records = run if isinstance(run, RunRecords) else RunRecords(absolute_path(run, "run"))
    if in_kernel():
        enable_renderer()
    if (drawn := _KINDS.get(kind)) is not None:
        return drawn(records, step)
    metrics = records.metrics()
    if not metrics.height and "/" in kind:  # before the first step it is unknown which columns there will be
        return empty_chart(NO_STEP, title=kind)
    try:
        return plot_metric(metrics, kind, evaluations=evaluation_scores(records.evaluations()))
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}. Kinds of charts: {', '.join(_KINDS)}") from None


_KINDS: dict[str, Callable[[RunRecords, int | None], Chart]] = {
    "learning": lambda run, step: plot_learning(run.metrics(), evaluations=evaluation_scores(run.evaluations())),
    "timeline": lambda run, step: plot_timeline(read_events(run.folder / EVENTS_FILE), step),
    "reward_by_turns": lambda run, step: plot_reward_by_turns(run.episodes()),
    "suites": lambda run, step: plot_suites(evaluation_scores(run.evaluations())),
}


def plot_reward_by_turns(episodes: pl.LazyFrame) -> alt.VConcatChart | alt.Chart:
    """Mean reward and exact match of training episodes by number of turns, with 95 % intervals, above the episode counts.

    Args:
        episodes: as from ``run.episodes()``.
    """
    import altair as alt

    frame = reward_by_turns(episodes)
    title = "reward and exact match by turns"
    if not frame.height:
        return empty_chart("No finished step has episodes yet: nothing to draw.", title=title)
    of_reward = frame.filter(pl.col("what") == "reward")
    scale = alt.Scale(domain=["reward", "exact match"], range=[SEEN, TRAINING])
    x = alt.X("n:O", axis=axis("turns in the episode", grid=False, labelAngle=0))
    numbers = ("mean|mean|.3f", "low|95 % from|.3f", "high|to|.3f", "episodes|episodes|,d")
    base = alt.Chart(frame).encode(x=x, xOffset="what:N", color=alt.Color("what:N", scale=scale, legend=legend()))
    means = base.encode(y=alt.Y("mean:Q", axis=values_axis("mean", format="~g")))
    upper = alt.layer(
        base.mark_rule(strokeWidth=1.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        means.mark_circle(size=70, opacity=1).encode(tooltip=tooltips("what:N|what", "n|turns", *numbers)),
    ).properties(width=WIDTH, height=HEIGHT, title=heading(title, f"{of_reward['episodes'].sum():,} episodes"))
    counts = alt.Chart(of_reward).mark_bar(color=GREY, opacity=0.6)
    lower = counts.encode(
        x=x,
        y=alt.Y("episodes:Q", axis=values_axis("episodes", tickCount=3, format="~s")),
        tooltip=tooltips("n|turns", "episodes||,d"),
    ).properties(width=WIDTH, height=60)
    return alt.vconcat(upper, lower, spacing=8).resolve_scale(color="independent")


def plot_suites(
    evaluations: pl.DataFrame,
    *,
    title: str = "exact match by suite",
    subtitle: Sequence[str] = ("lines: 95 % intervals",),
) -> alt.LayerChart | alt.Chart:
    """Bars per suite, one for each of a run's evaluations in order, with 95 % intervals.

    Args:
        evaluations: as from :func:`evaluation_scores`.
        subtitle: lines below the title.
    """
    import altair as alt

    if not evaluations.height:
        return empty_chart(
            "No evaluation has been made yet: pass held_out questions, or wait for the first evaluation.", title=title
        )
    chosen = thinned(evaluations.select("order").unique().sort("order"), MAX_EVALUATIONS)
    label = pl.concat_str(pl.col("order") + 1, pl.lit(". "), pl.col("label").map_elements(_name, pl.String))
    suite = pl.col("suite").map_elements(_name, pl.String)
    rows = evaluations.join(chosen, on="order", how="semi").with_columns(label=label, suite=suite)
    suites = sorted(rows["suite"].unique(), key=lambda name: (name != ALL_SUITES, name))
    labels = rows["label"].unique(maintain_order=True).to_list()
    # From pale to full in the order of the evaluations.
    shades = alt.Scale(domain=labels, scheme=alt.SchemeParams(name="blues", extent=[0.35, 0.9]))
    names_axis = axis(None, grid=False, labelOverlap=False, labelLimit=120, labelAngle=0 if len(suites) < 6 else -30)
    base = alt.Chart(rows).encode(
        x=alt.X("suite:N", sort=suites, axis=names_axis, scale=alt.Scale(paddingInner=0.25, paddingOuter=0.1)),
        xOffset=alt.XOffset("label:N", sort=labels, scale=alt.Scale(paddingInner=0.12)),
        color=alt.Color("label:N", scale=shades, legend=legend(columns=3)),
    )
    y = alt.Y("mean:Q", axis=values_axis("exact match", format=".0%"), scale=alt.Scale(zero=True, nice=True))
    numbers = ("mean|exact match|.1%", "low|95 % from|.1%", "high|to|.1%")
    layers = (
        base.mark_bar(opacity=0.9).encode(y=y, tooltip=tooltips("label:N|evaluation", "suite:N|suite", *numbers)),
        # In the bar's colour, the lower half of the interval would be invisible.
        base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q"), y2="high:Q", color=alt.value(NOTE_COLOUR)),
    )
    chart = cast("alt.LayerChart", alt.layer(*layers))
    return chart.properties(width=WIDTH, height=HEIGHT, title=heading(title, subtitle))


def _name(text: str) -> str:
    return shown(text, 40)


def evaluation_scores(evaluations: pl.LazyFrame) -> pl.DataFrame:
    """One row per evaluation and suite, and one for all suites: ``order``, ``label``, ``step``, ``suite``, ``mean``, ``low`` and
    ``high`` (95 %) of exact match.

    Computed as in :class:`searchr1_async.runs.evaluation.Evaluation`: mean over questions of each question's sample mean, with
    Wilson's interval on the effective number of questions.

    Args:
        evaluations: episodes, as from :meth:`searchr1_async.records.run_records.RunRecords.evaluations`.
    """
    score = pl.col("correct").filter(pl.col("stop_reason") != "failed").fill_null(0.0).mean()
    asked = evaluations.group_by("label", "data_source", "question_id", "question", maintain_order=True)
    questions = asked.agg(pl.col("step").first(), score=score).collect()
    rows = []
    for order, ((label,), own) in enumerate(questions.group_by("label", maintain_order=True)):
        suites = [str(suite) for suite in own["data_source"].unique().sort()]
        for suite in [ALL_SUITES, *suites] if len(suites) > 1 else suites:
            of_suite = own if suite == ALL_SUITES else own.filter(pl.col("data_source") == suite)
            scores = of_suite["score"].drop_nulls().to_list()
            if scores:
                mean, (low, high) = sum(scores) / len(scores), mean_interval(scores)
                rows.append((order, label, own["step"][0], suite, mean, low, high))
    schema = {"order": pl.Int64, "label": pl.String, "step": pl.Int64, "suite": pl.String}
    numbers = dict.fromkeys(("mean", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, schema=schema | numbers, orient="row")


def reward_by_turns(episodes: pl.LazyFrame) -> pl.DataFrame:
    """Training outcomes by number of turns.

    Columns ``n``, ``what`` (``reward``, ``exact match``), ``mean``, ``low``, ``high`` (95 %: Wilson's for exact match, 1.96
    standard errors for reward) and ``episodes``. Failed and cut episodes are excluded.
    """
    right = pl.col("correct").fill_null(0.0).clip(0.0, 1.0).sum()
    grouped = (
        episodes.filter(~pl.col("stop_reason").is_in(["failed", "time_limit"]))
        .group_by(n="turn_count")
        .agg(
            pl.len().alias("episodes"),
            mean=pl.col("reward").mean(),
            error=pl.col("reward").std() / pl.len().sqrt(),
            right=right,
        )
    )
    rows = []
    for n, episodes_n, mean, error, right_n in grouped.sort("n").collect().iter_rows():
        margin = math.nan if error is None else Z_95 * error
        rows.append((n, "reward", mean, mean - margin, mean + margin, episodes_n))
        rows.append((n, "exact match", right_n / episodes_n, *wilson_interval(right_n, episodes_n), episodes_n))
    schema = {"n": pl.Int64, "what": pl.String, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"episodes": pl.Int64}, orient="row").fill_nan(None)


def last_picture(
    title: str, subtitle: Sequence[str], steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> bytes:
    """The last picture of a live view as PNG: the curves, or for work without steps the suites of its evaluations.

    Args:
        steps: rows of :class:`~searchr1_async.watch.state.RunState`, as are the evaluations.
    """
    scores = table(evaluations)
    if not steps:
        return small_png(plot_suites(scores, title=title, subtitle=subtitle).to_dict())
    metrics = table(steps).rename({curve.name: curve.column for curve in CURVES})
    return small_png(plot_learning(metrics, evaluations=scores, title=title, subtitle=subtitle).to_dict())


def page_charts(steps: int) -> tuple[dict[str, Any], bytes]:
    """The chart of a live view's page, as in :func:`~searchr1_async.watch.drawing.live_chart`, and Vega to draw it: a gzipped ES module
    that exports ``vegaEmbed``."""
    import vl_convert

    vega = gzip.compress(vl_convert.javascript_bundle("export { vegaEmbed };").encode(), 6)
    return live_chart(steps), vega

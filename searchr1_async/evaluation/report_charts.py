"""Evaluations as Altair charts: scores by suite and outcomes."""

from __future__ import annotations

from typing import Any

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.evaluation.report_tables import OUTCOME_MEANINGS, OUTCOME_WORDS, metric_words, one_line
from searchr1_async.records.scores import ALL_SUITES, MACRO, OUTCOMES, check_metric
from searchr1_async.runs.evaluation import Evaluation

OUTCOME_COLOURS: dict[str, str] = {
    "right_seen": "#2f8f5b",
    "right_unseen": "#9ccfae",
    "reading_failed": "#e0a03b",
    "search_failed": "#c2554a",
    "no_search": "#8d6aa8",
    "no_answer": "#8a929e",
    "failed": "#c9ced6",
}
"""Distinguishable by lightness for common colour blindness; also used by the page."""

SHARES = ("exact_match", "f1", "cover_match", "format", "judged", "answer_in_passage", "gold_recall")


def plot_figure(
    report: ReportFrames, metric: str, *, title: str | None = None, width: int | None = None, height: int = 260
) -> Any:
    """See :meth:`Report.plot`. Systems get categorical colours: unlike a run's evaluations, they have no order."""
    import altair as alt

    from searchr1_async.watch.chart_parts import (
        NOTE_COLOUR,
        SERIES,
        axis,
        empty_chart,
        enable_renderer,
        heading,
        legend,
        table,
        values_axis,
    )

    check_metric(metric)
    enable_renderer()
    words = metric_words(metric)
    text = title if title is not None else f"{words} by suite"
    labels = {label: one_line(label, 40) for label in report}
    rows = _figure_rows(report, metric, labels)
    if not rows:
        return empty_chart("No results.", title=text)
    shown = [one_line(column, 40) for column in report.columns]
    form = ".0%" if metric in SHARES else "~g"
    colours = [SERIES[place % len(SERIES)] for place in range(len(labels))]
    # At least 12 pixels per bar: seven suites and five systems exceed the default width.
    wide = width or min(max(460, len(shown) * (len(labels) * 14 + 24)), 1100)
    base = alt.Chart(table(rows)).encode(
        x=alt.X("suite:N", sort=shown, axis=axis(None, grid=False, labelOverlap=False, labelLimit=120,
                                                 labelAngle=0 if len(shown) * 80 <= wide else -30),
                scale=alt.Scale(paddingInner=0.22, paddingOuter=0.1)),
        xOffset=alt.XOffset("system:N", sort=list(labels.values()), scale=alt.Scale(paddingInner=0.12)),
        color=alt.Color("system:N", sort=list(labels.values()),
                        scale=alt.Scale(domain=list(labels.values()), range=colours), legend=legend(columns=3)),
    )  # fmt: skip
    tooltips = [
        alt.Tooltip("system:N"),
        alt.Tooltip("suite:N"),
        alt.Tooltip("mean:Q", title=words, format=".1%" if form == ".0%" else ".3~g"),
        alt.Tooltip("low:Q", title="95 % from", format=".1%" if form == ".0%" else ".3~g"),
        alt.Tooltip("high:Q", title="to", format=".1%" if form == ".0%" else ".3~g"),
    ]
    y = alt.Y("mean:Q", axis=values_axis(words, format=form), scale=alt.Scale(zero=True, nice=True))
    bars = base.mark_bar(opacity=0.85).encode(y=y, tooltip=tooltips)
    # In the bar's colour, the part of the interval inside the bar would be invisible.
    lines = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q", color=alt.value(NOTE_COLOUR))
    return alt.layer(bars, lines).properties(width=wide, height=height, title=heading(text, "lines: 95 % intervals"))


def _figure_rows(report: ReportFrames, metric: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    for label, evaluation in report.items():
        for column in report.columns:
            if column not in evaluation.suites and column not in (ALL_SUITES, MACRO):
                continue
            mean, low, high = evaluation.estimate(metric, column)
            if mean == mean:
                rows.append(
                    {"system": labels[label], "suite": one_line(column, 40), "mean": mean, "low": low, "high": high}
                )
    return rows


def plot_outcomes(
    report: ReportFrames, *, title: str | None = None, width: int = 560, height: int | None = None
) -> Any:
    import altair as alt

    from searchr1_async.watch.chart_parts import axis, empty_chart, enable_renderer, heading, legend, table

    enable_renderer()
    text = title if title is not None else "outcomes"
    frame = report.outcomes()
    rows = []
    for label, evaluation in report.items():
        suite = ALL_SUITES if len(evaluation.suites) > 1 else next(iter(evaluation.suites), "")
        for row in frame.filter(system=label, suite=suite).iter_rows(named=True):
            if row["share"] is not None and row["share"] > 0:
                words = OUTCOME_WORDS[row["outcome"]]
                rows.append({"system": one_line(label, 40), "outcome": words, "order": OUTCOMES.index(row["outcome"]),
                             "share": row["share"], "episodes": row["episodes"], "meaning": OUTCOME_MEANINGS[row["outcome"]]})  # fmt: skip
    if not rows:
        return empty_chart("No finished episodes.", title=text)
    shown = [outcome for outcome in OUTCOMES if outcome != "failed"]
    labels = [one_line(label, 40) for label in report]
    chart = (
        alt.Chart(table(rows))
        .mark_bar(height={"band": 0.7})
        .encode(
            y=alt.Y("system:N", sort=labels, axis=axis(None, grid=False, labelLimit=220)),
            x=alt.X("share:Q", stack="zero", axis=axis("share of finished episodes", format=".0%"), scale=alt.Scale(domain=[0, 1])),
            order=alt.Order("order:Q"),
            color=alt.Color("outcome:N", sort=[OUTCOME_WORDS[outcome] for outcome in shown],
                            scale=alt.Scale(domain=[OUTCOME_WORDS[outcome] for outcome in shown],
                                            range=[OUTCOME_COLOURS[outcome] for outcome in shown]), legend=legend(columns=3)),
            tooltip=["system:N", "outcome:N", "meaning:N", alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("episodes:Q", format=",d")],
        )
    )  # fmt: skip
    return chart.properties(width=width, height=height or 34 * len(labels), title=heading(text))


_SCHEMA = pl.Schema(
    {"order": pl.Int64, "label": pl.String, "step": pl.Int64, "suite": pl.String}
    | {"mean": pl.Float64, "low": pl.Float64, "high": pl.Float64, "questions": pl.Int64}
)


def plot_suites(*evaluations: Evaluation, metric: str = "exact_match", **options: Any) -> Any:
    """An Altair chart of a score per suite, evaluations side by side with 95 % intervals.

    With several suites, also pooled over all questions and as the unweighted mean over suites. Save it with
    ``.save("suites.png")`` (or ``.svg``).

    Args:
        evaluations: in display order, with unique labels.
        metric: ``exact_match``, ``f1``, ``cover_match``, ``format``, or ``judged``.
        options: ``title``, ``width`` and ``height`` (pixels).

    Raises:
        ConfigurationError: two evaluations have the same label, or the score is unknown.
    """
    from searchr1_async.watch import charts as plots

    labels = [evaluation.label for evaluation in evaluations]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(
            f"two evaluations have the same label ({', '.join(labels)}): set labels with evaluate(…, systems={{…}})"
        )
    plots.enable_renderer()
    return plots.plot_suites(
        suite_rows(evaluations, metric), metric=metric.replace("_", " "), are_stages=False, **options
    )


def suite_rows(evaluations: tuple[Evaluation, ...], metric: str) -> pl.DataFrame:
    """One row per evaluation and suite with a finished question."""
    from searchr1_async.watch.outcome_charts import ALL_SUITES as ALL_NAMED
    from searchr1_async.watch.outcome_charts import MACRO_AVERAGE

    named = {ALL_SUITES: ALL_NAMED, MACRO: MACRO_AVERAGE}
    rows = []
    for order, evaluation in enumerate(evaluations):
        values = evaluation.values_of(metric)
        over = [ALL_SUITES, MACRO] if len(values) > 1 else []
        for suite in [*over, *(name for name in evaluation.suites if values[name].size)]:
            questions = values[suite].size if suite in values else sum(own.size for own in values.values())
            name = suite if suite in values else named[suite]
            if questions:
                estimate = evaluation.estimate(metric, suite)
                rows.append((order, evaluation.label, evaluation.step, name, *estimate, questions))
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")

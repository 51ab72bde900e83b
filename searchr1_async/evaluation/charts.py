"""Charts of evaluations."""

from __future__ import annotations

from typing import Any

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.records.scores import ALL_SUITES, MACRO
from searchr1_async.runs.evaluation import Evaluation

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
    from searchr1_async.watch.charts.theme import ALL_SUITES as ALL_NAMED
    from searchr1_async.watch.charts.theme import MACRO_AVERAGE

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

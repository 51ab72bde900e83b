"""Metrics aggregated from a scores frame. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.scores import METRICS, OUTCOMES, RIGHT
from searchr1_async.evaluation.statistics import Estimate, Floats, macro_interval, mean_interval

COSTS = (
    *("turns", "searches", "prompt_tokens", "cached_prompt_tokens", "sampled_tokens"),
    *("seconds", "sampling_seconds", "search_seconds"),
)
"""Cost columns; seconds are durations of single episodes that ran concurrently with others."""
FIGURES = (*METRICS, "judged", "answer_in_passage", "gold_recall", "calls", "malformed_calls", *COSTS)
"""Columns of a scores frame that can be averaged."""
QUESTION = ("suite", "question_id")
"""Key of a question: ids are unique only within a suite."""
ALL_SUITES, MACRO = "all", "macro"


def question_means(scores: pl.DataFrame) -> pl.DataFrame:
    """One row per question in order of appearance: ``suite``, ``question_id``, ``question``, ``golden_answers``, ``hop``,
    ``samples``, ``finished``, ``right`` (of the finished ones), and the mean of each of :data:`FIGURES` over finished samples
    (null without any)."""
    finished = ~pl.col("failed")
    return scores.group_by(*QUESTION, maintain_order=True).agg(
        pl.col("question", "golden_answers", "hop").first(),
        samples=pl.len().cast(pl.Int64),
        finished=finished.sum().cast(pl.Int64),
        right=(pl.col("exact_match") >= RIGHT).sum().cast(pl.Int64),
        **{name: pl.col(name).cast(pl.Float64).filter(finished).mean() for name in FIGURES},
    )


def outcome_frame(scores: pl.DataFrame) -> pl.DataFrame:
    """``suite``, ``outcome``, ``episodes`` and ``share`` (of finished episodes; null for ``failed``, NaN without any) for each
    suite, and for ``all`` if there are several."""
    frames = []
    for suite, own in _suites(scores):
        counts = dict(own.group_by("outcome").len().iter_rows())
        finished = own.height - counts.get("failed", 0)
        for outcome in OUTCOMES:
            count = counts.get(outcome, 0)
            share = None if outcome == "failed" else count / finished if finished else float("nan")
            frames.append((suite, outcome, count, share))
    schema = {"suite": pl.String, "outcome": pl.String, "episodes": pl.Int64, "share": pl.Float64}
    return pl.DataFrame(frames, schema=schema, orient="row")


def cost_frame(scores: pl.DataFrame) -> pl.DataFrame:
    """Costs of finished episodes: one row per suite (and ``all`` if there are several) and each of :data:`COSTS`.

    Columns ``suite``, ``cost``, ``questions``, ``episodes``, ``total``; ``mean``, ``median`` and ``p95`` per episode; and the
    same per question over all its samples (``question_mean``, …).
    """
    schema = pl.Schema(
        {"suite": pl.String, "cost": pl.String, "questions": pl.Int64, "episodes": pl.Int64}
        | {name: pl.Float64 for name in ("total", "mean", "median", "p95")}
        | {name: pl.Float64 for name in ("question_mean", "question_median", "question_p95")}
    )
    rows = []
    for suite, own in _suites(scores.filter(~pl.col("failed"))):
        asked = own.group_by(*QUESTION).agg(pl.col(*COSTS).sum())
        for cost in COSTS:
            each, question = own[cost].cast(pl.Float64), asked[cost].cast(pl.Float64)
            figures = [value for s in (each, question) for value in (s.mean(), s.median(), s.quantile(0.95, "linear"))]
            rows.append((suite, cost, asked.height, own.height, each.sum(), *figures))
    return pl.DataFrame(rows, schema=schema, orient="row")


def suites_of(scores: pl.DataFrame) -> tuple[str, ...]:
    """Suites in order of appearance."""
    return tuple(scores["suite"].unique(maintain_order=True).to_list())


def _suites(scores: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Rows of each suite, and of ``all`` if there are several."""
    parts = [(str(suite), own) for (suite,), own in scores.group_by("suite", maintain_order=True)]
    return [*parts, (ALL_SUITES, scores)] if len(parts) > 1 else parts


def check_metric(metric: str) -> None:
    """Raises :class:`ConfigurationError` for an unknown metric."""
    if metric not in FIGURES:
        raise ConfigurationError(f"there is no metric {metric!r}: choose one of {', '.join(FIGURES)}")


def check_suite(suite: str, suites: Sequence[str], label: str) -> None:
    """Raises :class:`ConfigurationError` for an unknown suite."""
    if suite not in suites:
        raise ConfigurationError(f"{label!r} has no suite {suite!r}: it has {', '.join(map(repr, suites)) or 'none'}")


def by_suite(values: pl.DataFrame, suites: Sequence[str]) -> dict[str, Floats]:
    """Per suite, the non-null values of its questions."""
    kept = values.drop_nulls("value").group_by("suite", maintain_order=True).agg("value")
    found = {str(suite): np.asarray(own, dtype=np.float64) for suite, own in kept.iter_rows()}
    return {suite: found.get(suite, np.empty(0)) for suite in suites}


def estimate_of(values: Mapping[str, Floats], suite: str | None, label: str) -> Estimate:
    """Mean over the questions of a suite, of ``all`` (or None), or over suites (``macro``).

    A suite that has one of these names takes precedence. Raises :class:`ConfigurationError` for an unknown suite.
    """
    if suite is None or (suite == ALL_SUITES and suite not in values):
        return _mean(np.concatenate([np.empty(0), *values.values()]))
    if suite == MACRO and suite not in values:
        return _macro(values)
    check_suite(suite, tuple(values), label)
    return _mean(values[suite])


def _macro(values: Mapping[str, Floats]) -> Estimate:
    means = [float(own.mean()) for own in values.values() if own.size]
    return Estimate(sum(means) / len(means) if means else math.nan, *macro_interval(list(values.values())))


def _mean(values: Floats) -> Estimate:
    return Estimate(float(values.mean()) if values.size else math.nan, *mean_interval(values))

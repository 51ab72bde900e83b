"""Figures of a scores frame, as frames. Pure."""

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
"""What a question takes; seconds of one episode by itself, while others are played beside it."""
FIGURES = (*METRICS, "judged", "answer_in_passage", "gold_recall", "calls", "malformed_calls", *COSTS)
"""Columns of a scores frame that have a mean."""
QUESTION = ("suite", "question_id")
"""What makes a question the same question: an identifier is unique within its suite only."""
ALL_SUITES, MACRO = "all", "macro"


def question_means(scores: pl.DataFrame) -> pl.DataFrame:
    """One row for each question, in the order of first sight: ``suite``, ``question_id``, ``question``, ``golden_answers``,
    ``hop``, ``samples``, ``finished`` and ``right`` (of these), and each of :data:`FIGURES` as the mean over its finished
    samples; null where it has none."""
    finished = ~pl.col("failed")
    return scores.group_by(*QUESTION, maintain_order=True).agg(
        pl.col("question", "golden_answers", "hop").first(),
        samples=pl.len().cast(pl.Int64),
        finished=finished.sum().cast(pl.Int64),
        right=(pl.col("exact_match") >= RIGHT).sum().cast(pl.Int64),
        **{name: pl.col(name).cast(pl.Float64).filter(finished).mean() for name in FIGURES},
    )


def outcome_frame(scores: pl.DataFrame) -> pl.DataFrame:
    """``suite``, ``outcome``, ``episodes`` and ``share`` (of the finished episodes; null for ``failed``, NaN of nothing):
    every outcome of every suite, and of all where there are several."""
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
    """What it took: a row for each suite, and for all where there are several, and each of :data:`COSTS`.

    Columns ``suite``, ``cost``, ``questions``, ``episodes``, ``total``, then ``mean``, ``median`` and ``p95`` (95th percentile) of
    an episode, and the same of a question with all its samples (``question_mean``, …). Finished episodes only.
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
    """The suites, in the order of first sight."""
    return tuple(scores["suite"].unique(maintain_order=True).to_list())


def _suites(scores: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Each suite's rows, and those of all where there are several."""
    parts = [(str(suite), own) for (suite,), own in scores.group_by("suite", maintain_order=True)]
    return [*parts, (ALL_SUITES, scores)] if len(parts) > 1 else parts


def check_metric(metric: str) -> None:
    """Raises :class:`ConfigurationError` where there is no such figure."""
    if metric not in FIGURES:
        raise ConfigurationError(f"there is no figure {metric!r}: choose one of {', '.join(FIGURES)}")


def check_suite(suite: str, suites: Sequence[str], label: str) -> None:
    """Raises :class:`ConfigurationError` where there is no such suite."""
    if suite not in suites:
        raise ConfigurationError(f"{label!r} has no suite {suite!r}: it has {', '.join(map(repr, suites)) or 'none'}")


def by_suite(values: pl.DataFrame, suites: Sequence[str]) -> dict[str, Floats]:
    """The questions' values of each suite, without those that have none; a suite of failures alone is empty."""
    kept = values.drop_nulls("value").group_by("suite", maintain_order=True).agg("value")
    found = {str(suite): np.asarray(own, dtype=np.float64) for suite, own in kept.iter_rows()}
    return {suite: found.get(suite, np.empty(0)) for suite in suites}


def estimate_of(values: Mapping[str, Floats], suite: str | None, label: str) -> Estimate:
    """The mean over the questions of a suite, of ``all`` (None too), or over suites (``macro``).

    A suite that is called so itself goes before. Raises :class:`ConfigurationError` where there is no such suite.
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

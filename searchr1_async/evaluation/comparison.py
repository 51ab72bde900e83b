"""Per-question comparison of two evaluations. Pure.

Inputs are frames from :func:`searchr1_async.evaluation.figures.question_means` and :mod:`.scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from searchr1_async.evaluation.figures import QUESTION
from searchr1_async.evaluation.statistics import (
    RESAMPLES,
    Floats,
    Interval,
    PairedDifference,
    difference_of,
    macro_difference_intervals,
)

FLIP_SCHEMA = pl.Schema(
    {
        "suite": pl.String,
        "question_id": pl.String,
        "question": pl.String,
        "golden_answers": pl.List(pl.String),
        "direction": pl.String,  # "improved" or "worsened"
        "before": pl.Float64,  # mean over samples
        "after": pl.Float64,
        "difference": pl.Float64,
        "before_answer": pl.String,
        "after_answer": pl.String,
        "before_sample": pl.Int64,  # sample number of the answer
        "after_sample": pl.Int64,
    }
)


def paired_questions(before: pl.DataFrame, after: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Questions with a score on both sides, in the order of ``before``: ``suite``, ``question_id``, ``before``, ``after``,
    ``difference``, ``is_single`` (one 0/1 sample on both sides)."""
    columns = [*QUESTION, "finished", pl.col(metric).alias("score")]
    pairs = before.select(columns).join(
        after.select(columns), on=list(QUESTION), suffix="_after", maintain_order="left"
    )
    is_binary = [pl.col(name).is_in([0.0, 1.0]) for name in ("score", "score_after")]
    return pairs.drop_nulls(["score", "score_after"]).select(
        *QUESTION,
        before="score",
        after="score_after",
        difference=pl.col("score_after") - pl.col("score"),
        is_single=(pl.col("finished") == 1) & (pl.col("finished_after") == 1) & is_binary[0] & is_binary[1],
    )


def pooled_difference(pairs: pl.DataFrame, seed: int = 0) -> PairedDifference:
    """Weights every question equally. ``pairs`` come from :func:`paired_questions`, at least one row."""
    return difference_of(pairs["difference"].to_numpy(), is_single=bool(pairs["is_single"].all()), seed=seed)


def macro_difference(pairs: pl.DataFrame, seed: int = 0) -> PairedDifference:
    """Weights every suite equally: :func:`macro_difference_of`. ``pairs`` as in :func:`pooled_difference`."""
    return macro_difference_of(
        [own["difference"].to_numpy() for _, own in pairs.group_by("suite", maintain_order=True)], seed=seed
    )


def macro_difference_of(suites: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> PairedDifference:
    """The unweighted mean of the suites' differences (one non-empty array per suite).

    The p-value is from a sign-flip test with questions weighted by suite; the interval is
    :func:`~searchr1_async.evaluation.statistics.macro_difference_intervals`.
    """
    questions = sum(map(len, suites))
    weighted = np.concatenate([own * (questions / (len(suites) * len(own))) for own in suites])
    found = difference_of(weighted, is_single=False, resamples=resamples, seed=seed)
    low, high = macro_difference_intervals(suites)
    mean = sum(float(own.mean()) for own in suites) / len(suites)
    return replace(found, mean=mean, interval=Interval(float(low), float(high)))


def flip_frame(pairs: pl.DataFrame, before: pl.DataFrame, after: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Questions whose score changed, with schema :data:`FLIP_SCHEMA`: largest change first, then by suite and id.

    ``pairs`` come from :func:`paired_questions`, ``before`` and ``after`` are scores frames.
    """
    changed = pairs.filter(pl.col("difference").abs() > 1e-9)
    texts = before.unique(list(QUESTION), keep="first").select(*QUESTION, "question", "golden_answers")
    parts = []
    for direction, is_gain in (("improved", True), ("worsened", False)):
        own = changed.filter((pl.col("difference") > 0) == is_gain).with_columns(direction=pl.lit(direction))
        own = own.join(_extreme_sample(before, metric, "before", best=not is_gain), on=list(QUESTION), how="left")
        parts.append(own.join(_extreme_sample(after, metric, "after", best=is_gain), on=list(QUESTION), how="left"))
    rows = pl.concat(parts).join(texts, on=list(QUESTION), how="left")
    rows = rows.sort(pl.col("difference").abs().round(9), *QUESTION, descending=[True, False, False])
    return rows.select(pl.col(name).cast(dtype) for name, dtype in FLIP_SCHEMA.items())


def _extreme_sample(scores: pl.DataFrame, metric: str, side: str, *, best: bool) -> pl.DataFrame:
    """Per question, its first best (or worst) sample."""
    ordered = scores.drop_nulls(metric).sort(metric, "sample", descending=[best, False], maintain_order=True)
    first = ordered.unique(list(QUESTION), keep="first", maintain_order=True)
    return first.select(*QUESTION, pl.col("answer").alias(f"{side}_answer"), pl.col("sample").alias(f"{side}_sample"))

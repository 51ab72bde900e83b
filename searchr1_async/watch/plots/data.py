"""Tidy data frames for charts. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.records.statistics import Z_95, mean_interval, wilson_interval
from searchr1_async.watch.curve import smoothed
from searchr1_async.watch.plots.theme import MAX_ROWS

ALL_SUITES = "all suites"
MACRO_AVERAGE = "macro average"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric with a short name."""

    column: str
    label: str
    is_share: bool = False
    part: str | None = None
    """The corresponding reward part in evaluations."""


METRICS = {
    "reward": Metric("env/all/reward/total", "reward"),
    "exact_match": Metric("env/all/correct", "exact match", is_share=True, part="correct"),
    "turns": Metric("env/all/turns_per_episode", "turns per episode"),
    "valid_calls": Metric("env/all/valid_calls", "tool calls that are valid", is_share=True),
    "searches": Metric("env/all/searches_per_episode", "searches per episode"),
    "answer_in_passage": Metric("env/all/answer_in_passage", "episodes shown the answer", is_share=True),
    "staleness": Metric("env/all/staleness", "staleness (optimiser steps)"),
}
"""By short name. Other columns go by their own name, with or without ``env/all/``."""


def metric_named(name: str, columns: Sequence[str]) -> Metric:
    """The metric called ``name``.

    Args:
        columns: present columns; a short name is valid even if its column is not there yet.

    Raises:
        ConfigurationError: no such metric; suggests close matches.
    """
    if (known := METRICS.get(name)) is not None:
        return known
    for column in (name, f"env/all/{name}"):
        if column in columns and column != "step":
            return Metric(column, column.removeprefix("env/all/"))
    raise ConfigurationError(f"there is no metric {name!r}. {_near(name, columns)}")


def _near(name: str, columns: Iterable[str]) -> str:
    names = [*METRICS, *(column.removeprefix("env/all/") for column in columns if column != "step")]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    near += [other for other in names if name.lower() in other.lower() and other not in near][: 4 - len(near)]
    known = f"Short names: {', '.join(METRICS)}; or any column of run.metrics."
    return f"Close matches: {', '.join(near)}. {known}" if near else known


def metric_rows(metrics: pl.DataFrame, metric: Metric) -> pl.DataFrame:
    """Columns ``step``, ``value``, ``smooth`` (local mean), ``low`` and ``high`` (plus or minus one local standard deviation),
    where the metric is finite."""
    schema = pl.Schema({name: pl.Float64() for name in ("step", "value", "smooth", "low", "high")})
    if metric.column not in metrics.columns or "step" not in metrics.columns:
        return pl.DataFrame(schema=schema)
    frame = metrics.select(step=pl.col("step").cast(pl.Float64), value=pl.col(metric.column).cast(pl.Float64))
    frame = frame.filter(pl.col("value").is_finite()).sort("step")
    mean_n, spread_n = smoothed(frame["value"].to_numpy())
    low_n, high_n = mean_n - spread_n, mean_n + spread_n
    if metric.is_share:
        low_n, high_n = low_n.clip(0, 1), high_n.clip(0, 1)
    return frame.with_columns(
        smooth=pl.Series(mean_n, dtype=pl.Float64), low=pl.Series(low_n, dtype=pl.Float64),
        high=pl.Series(high_n, dtype=pl.Float64),
    )  # fmt: skip


def thinned(frame: pl.DataFrame, most: int = MAX_ROWS) -> pl.DataFrame:
    """At most ``most`` rows, evenly spaced, first and last included."""
    if frame.height <= most:
        return frame
    places = [round(place * (frame.height - 1) / (most - 1)) for place in range(most)]
    return frame[places]


def evaluation_scores(evaluations: pl.LazyFrame, part: str = "correct") -> pl.DataFrame:
    """One row per evaluation and suite, and one for all suites: ``order``, ``label``, ``step``, ``suite``, ``mean``, ``low``,
    ``high`` (95 %) and ``questions``.

    Computed as in :class:`searchr1_async.runs.evaluation.Evaluation`: mean over questions of each question's sample mean, with
    Wilson's interval on the effective number of questions.

    Args:
        evaluations: episodes, as from :meth:`searchr1_async.records.run_records.RunRecords.evaluations`.
        part: a reward part that has its own column.
    """
    finished = pl.col("stop_reason") != "failed"
    asked = (
        evaluations.with_row_index("row")
        .group_by("label", "data_source", "question_id", "question", maintain_order=True)
        .agg(
            pl.col("row").filter(finished).min(),
            pl.col("row").min().alias("asked"),
            pl.col("step").first(),
            pl.col(part).filter(finished).fill_null(0.0).mean().alias("score"),
        )
        .select("row", "asked", "label", "step", "data_source", "score")
        .collect()
    )
    rows = []
    for order, ((label,), own) in enumerate(asked.sort("asked").group_by("label", maintain_order=True)):
        suites = [str(suite) for suite in own["data_source"].unique().sort()]
        for suite in [ALL_SUITES, *suites] if len(suites) > 1 else suites:
            of_suite = own if suite == ALL_SUITES else own.filter(pl.col("data_source") == suite)
            scores = of_suite.drop_nulls("score").sort("row")["score"].to_list()
            if scores:
                low, high = mean_interval(scores)
                rows.append((order, label, own["step"][0], suite, sum(scores) / len(scores), low, high, len(scores)))
    names = ("order", "label", "step", "suite", "mean", "low", "high", "questions")
    types = (pl.Int64, pl.String, pl.Int64, pl.String, pl.Float64, pl.Float64, pl.Float64, pl.Int64)
    return pl.DataFrame(rows, schema=dict(zip(names, types, strict=True)), orient="row")


def overall(scores: pl.DataFrame) -> pl.DataFrame:
    """From :func:`evaluation_scores`, one row per evaluation: all suites, or the only one."""
    return scores.group_by("order", maintain_order=True).first().sort("order")


def reward_by(episodes: pl.LazyFrame, by: str) -> pl.DataFrame:
    """Training outcomes by number of ``turns`` or ``searches``.

    Columns ``n``, ``what`` (``reward``, ``exact match``), ``mean``, ``low``, ``high`` (95 %: Wilson's for exact match, 1.96
    standard errors for reward) and ``episodes``. Failed and cut episodes are excluded.
    """
    count = pl.col("turn_count") if by == "turns" else _searches()
    grouped = (
        episodes.filter(~pl.col("stop_reason").is_in(["failed", "time_limit"]))
        .select(n=count.cast(pl.Int64), reward="reward", correct=pl.col("correct").fill_null(0.0))
        .group_by("n")
        .agg(
            pl.len().alias("episodes"),
            pl.col("reward").mean().alias("mean"),
            pl.col("reward").std().fill_null(0.0).alias("deviation"),
            pl.col("correct").sum().alias("right"),
        )
        .sort("n")
        .collect()
    )
    rows = []
    for row in grouped.iter_rows(named=True):
        episodes_n = row["episodes"]
        margin = Z_95 * row["deviation"] / math.sqrt(episodes_n) if episodes_n > 1 else math.nan
        rows.append((row["n"], "reward", row["mean"], row["mean"] - margin, row["mean"] + margin, episodes_n))
        right = min(max(row["right"], 0.0), float(episodes_n))
        rows.append((row["n"], "exact match", right / episodes_n, *wilson_interval(right, episodes_n), episodes_n))
    schema = {"n": pl.Int64, "what": pl.String, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"episodes": pl.Int64}, orient="row").fill_nan(None)


def _searches() -> pl.Expr:
    """Executed searches per episode: the result lists of all its calls."""
    return pl.col("turns").list.eval(pl.element().struct.field("passages").list.len().fill_null(0)).list.sum()

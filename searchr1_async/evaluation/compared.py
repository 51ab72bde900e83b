"""Comparisons between the systems of a report. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.records.scores import ALL_SUITES, MACRO, QUESTION
from searchr1_async.records.statistics import PairedDifference, holm_correction
from searchr1_async.runs.evaluation import Evaluation, compare

COMPARISON_SCHEMA = pl.Schema(
    {
        "before": pl.String,
        "after": pl.String,
        "suite": pl.String,  # also "all" and "macro" if there are several
        "difference": pl.Float64,  # mean over questions of after - before
        "low": pl.Float64,  # 95 %
        "high": pl.Float64,
        "p_value": pl.Float64,
        "p_holm": pl.Float64,  # Holm-adjusted, see comparison_frame
        "better": pl.Int64,  # questions
        "worse": pl.Int64,
        "questions": pl.Int64,
        "method": pl.String,
    }
)

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ComparisonOf:
    before: Evaluation
    after: Evaluation

    @property
    def is_paired(self) -> bool:
        """Whether both have the same questions."""
        asked_before, asked_after = (own.by_question.select(QUESTION) for own in (self.before, self.after))
        return (
            asked_before.height == asked_after.height
            and not asked_before.join(asked_after, on=list(QUESTION), how="anti").height
        )

    @property
    def suites(self) -> tuple[str, ...]:
        """Each suite; with several, also ``all`` and ``macro``."""
        own = self.before.suites
        return (*own, ALL_SUITES, MACRO) if len(own) > 1 else own

    def difference(self, suite: str, metric: str) -> PairedDifference | None:
        """None if no question was finished on both sides."""
        try:
            return compare(self.before, self.after, metric, suite=suite)
        except ConfigurationError:
            return None


def comparison_frame(pairs: Sequence[ComparisonOf], metric: str) -> pl.DataFrame:
    """Compares the pairs per suite, with schema :data:`COMPARISON_SCHEMA`; pairs with different questions are excluded.

    ``p_holm`` is adjusted within three families: all ``all`` rows, all ``macro`` rows, and all single-suite rows (Holm 1979).
    """
    found = [
        (pair, suite, difference)
        for pair in pairs
        if pair.is_paired
        for suite in pair.suites
        if (difference := pair.difference(suite, metric)) is not None
    ]
    rows = [
        {
            "before": pair.before.label,
            "after": pair.after.label,
            "suite": suite,
            "difference": difference.mean,
            "low": difference.interval.low,
            "high": difference.interval.high,
            "p_value": difference.p_value,
            "p_holm": p_holm,
            "better": difference.improved,
            "worse": difference.worsened,
            "questions": difference.questions,
            "method": difference.method,
        }
        for (pair, suite, difference), p_holm in zip(found, _adjusted(found), strict=True)
    ]
    return pl.DataFrame(rows, schema=COMPARISON_SCHEMA)


def _adjusted(found: Sequence[tuple[ComparisonOf, str, PairedDifference]]) -> list[float]:
    adjusted = [math.nan] * len(found)
    kinds = [suite if suite in (ALL_SUITES, MACRO) else "suite" for _, suite, _ in found]
    for kind in dict.fromkeys(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        for place, p in zip(places, holm_correction([found[place][2].p_value for place in places]), strict=True):
            adjusted[place] = p
    return adjusted


def best_systems(evaluations: Sequence[Evaluation], columns: Sequence[str], metric: str) -> dict[str, str]:
    """Per column, the best system if it beats the next one at the 5 % level, Holm-adjusted over columns."""
    tested: list[tuple[str, str, float]] = []
    for column in columns:
        means = {
            evaluation.label: (evaluation.estimate(metric, column).mean, evaluation)
            for evaluation in evaluations
            if column in evaluation.suites or (column in (ALL_SUITES, MACRO) and evaluation.suites)
        }
        ranked = sorted((pair for pair in means.values() if not math.isnan(pair[0])), key=lambda pair: -pair[0])
        if len(ranked) < 2 or ranked[0][0] == ranked[1][0]:
            continue
        pair = ComparisonOf(ranked[1][1], ranked[0][1])
        if pair.is_paired and (difference := pair.difference(column, metric)) is not None:
            tested.append((column, ranked[0][1].label, difference.p_value))
    adjusted = holm_correction([p for _, _, p in tested])
    return {column: label for (column, label, _), p in zip(tested, adjusted, strict=True) if p < SIGNIFICANT}

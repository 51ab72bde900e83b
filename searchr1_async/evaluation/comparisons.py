"""Comparisons between the systems of a report. Pure.

Side-by-side tables of evaluations: aligned text, rows for a page, a frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def systems_comparison_frame(pairs: Sequence[ComparisonOf], metric: str) -> pl.DataFrame:
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


_SCHEMA = {
    "stage": pl.String,
    "step": pl.Int64,
    "questions": pl.Int64,
    "episodes": pl.Int64,
    "failed": pl.Int64,
    "exact_match": pl.Float64,
    "exact_match_low": pl.Float64,
    "exact_match_high": pl.Float64,
    "f1": pl.Float64,
    "turns_per_episode": pl.Float64,
    "valid_calls": pl.Float64,
    "answer_in_passage": pl.Float64,
}


def comparison_frame(evaluations: Sequence[Evaluation]) -> pl.DataFrame:
    """One row of numbers per evaluation; shares are 0 to 1, missing values null."""
    rows = [
        (
            evaluation.label,
            evaluation.step,
            evaluation.questions,
            len(evaluation.episodes),
            evaluation.failed,
            evaluation.exact_match,
            *evaluation.exact_match_interval,
            evaluation.f1,
            evaluation.turns_per_episode,
            evaluation.valid_call_fraction,
            evaluation.answer_in_passage,
        )
        for evaluation in evaluations
    ]
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row").fill_nan(None)


def comparison_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    """Table cells as text, by column heading; ``failed`` appears only if an episode failed."""
    any_failed = any(evaluation.failed for evaluation in evaluations)
    rows: list[dict[str, str]] = []
    for evaluation in evaluations:
        low, high = evaluation.exact_match_interval
        questions = str(evaluation.questions)
        if evaluation.samples_per_question > 1:
            questions += f" × {evaluation.samples_per_question}"
        row = {
            "stage": evaluation.label,
            "questions": questions,
            "exact match [95 %]": _missing_or(
                evaluation.exact_match, f"{evaluation.exact_match:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
            ),
            "F1": _missing_or(evaluation.f1, f"{evaluation.f1:.3f}"),
            "turns/episode": _missing_or(evaluation.turns_per_episode, f"{evaluation.turns_per_episode:.2f}"),
            "valid calls": _missing_or(evaluation.valid_call_fraction, f"{evaluation.valid_call_fraction:.1%}"),
            "answer seen": _missing_or(evaluation.answer_in_passage, f"{evaluation.answer_in_passage:.1%}"),
        }
        if any_failed:
            row["failed"] = str(evaluation.failed)
        rows.append(row)
    return rows


def comparison_table(evaluations: Sequence[Evaluation]) -> str:
    """Aligned plain text; the last line is the paired difference of the last two evaluations."""
    rows = comparison_rows(evaluations)
    if not rows:
        return "no evaluations"
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [
        _aligned({name: name for name in widths}, widths),
        "  ".join("─" * width for width in widths.values()),
        *(_aligned(row, widths) for row in rows),
    ]
    difference = difference_line(evaluations)
    return "\n".join([*lines, *([difference] if difference else [])])


def difference_line(evaluations: Sequence[Evaluation]) -> str:
    """The paired difference of the last two evaluations as text; empty for fewer than two."""
    if len(evaluations) < 2:
        return ""
    before, after = evaluations[-2:]
    name = f"{before.label} → {after.label}"
    try:
        return f"{name}: {describe(compare(before, after))}"
    except ConfigurationError:
        return f"{name}: not paired, because the questions differ"


def describe(difference: PairedDifference) -> str:
    """A paired difference of shares as text, in percentage points."""
    low, high = difference.interval
    p_value = "p < 0.0001" if difference.p_value < 1e-4 else f"p = {difference.p_value:.2g}"
    return (
        f"{100 * difference.mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], {p_value} ({difference.method}); "
        f"{difference.improved} better and {difference.worsened} worse of {difference.questions} questions"
    )


def _aligned(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    first, *others = widths
    cells = [row[first].ljust(widths[first]), *(row[name].rjust(widths[name]) for name in others)]
    return "  ".join(cells).rstrip()


def _missing_or(value: float, text: str) -> str:
    return "–" if math.isnan(value) else text

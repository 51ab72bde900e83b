"""Side-by-side tables of evaluations: aligned text, rows for a page, a frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.records.statistics import PairedDifference
from searchr1_async.runs.evaluation import Evaluation, compare

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

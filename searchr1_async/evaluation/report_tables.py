"""The tables of a report, independent of the output format, with names of metrics and outcomes and number formatting. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from searchr1_async.evaluation.published import Beside
from searchr1_async.evaluation.report_frames import SIGNIFICANT, ReportFrames
from searchr1_async.records.scores import ALL_SUITES, MACRO, OUTCOMES
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.watch.viewer.markup import visible_text

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. Its texts are untrusted: renderers escape them."""

    text: str
    detail: str = ""
    """Secondary text in a smaller font: an interval, a count."""
    mark: Literal["", "better", "worse"] = ""
    """Marks a significant result."""
    href: str | None = None
    """Relative address, made by this package only."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first cell of each row is its heading."""

    headings: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


def table_of(headings: Sequence[Cell | str], rows: Sequence[Sequence[Cell | str]], caption: str = "") -> Table:
    """A table from cells or plain texts."""
    return Table(tuple(map(_cell, headings)), tuple(tuple(map(_cell, row)) for row in rows), caption)


def _cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def one_line(text: str, longest: int = 120) -> str:
    """Untrusted text as one line without invisible characters, truncated to ``longest``."""
    # Truncated first: scanning a long text for invisible characters is slow.
    shown = visible_text(" ".join(text[: 4 * longest].split()))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def percent(value: float | None) -> str:
    """``0.4123`` as ``41.2``; a dash if missing."""
    return MISSING if _is_missing(value) else f"{100 * value:.1f}"  # type: ignore[operator]


def points(value: float | None) -> str:
    """A difference of shares, ``0.041`` as ``+4.1``; a dash if missing."""
    return MISSING if _is_missing(value) else f"{100 * value:+.1f}"  # type: ignore[operator]


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """``[36.9, 45.6]``; empty if missing."""
    if _is_missing(low) or _is_missing(high):
        return ""
    shown = points if signed else percent
    return f"[{shown(low)}, {shown(high)}]"


def p_value(value: float | None) -> str:
    """Two significant digits, never 0."""
    if _is_missing(value):
        return MISSING
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"  # type: ignore[operator]


def number(value: float | None, digits: int = 0) -> str:
    """With thousands separators; a dash if missing."""
    return MISSING if _is_missing(value) else f"{value:,.{digits}f}"


def counted(count: int, noun: str) -> str:
    """``1 question``, ``1,200 questions``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


METRIC_WORDS = {
    "exact_match": "exact match",
    "f1": "F1",
    "cover_match": "cover match",
    "format": "format",
    "judged": "judged right",
    "answer_in_passage": "answer seen",
    "gold_recall": "gold passages seen",
}

METRIC_MEANINGS = {
    "exact_match": "the answer equals a golden answer after SQuAD normalisation",
    "f1": "token overlap with the best-matching golden answer",
    "cover_match": "the answer contains a golden answer as whole words",
    "format": "the answer could be parsed",
    "judged": "a judge model accepts the answer",
}

OUTCOME_WORDS: dict[str, str] = {
    "right_seen": "right, answer seen",
    "right_unseen": "right, answer not seen",
    "reading_failed": "reading failed",
    "search_failed": "search failed",
    "no_search": "wrong, no search",
    "no_answer": "no answer",
    "failed": "service failed",
}

OUTCOME_MEANINGS: dict[str, str] = {
    "right_seen": "right, and a retrieved passage contains a golden answer",
    "right_unseen": "right, but no retrieved passage contains a golden answer",
    "reading_failed": "wrong, although a retrieved passage contains a golden answer",
    "search_failed": "wrong; it searched, but no retrieved passage contains a golden answer",
    "no_search": "wrong, without a valid search; for systems without search, every wrong answer",
    "no_answer": "no parseable answer",
    "failed": "a service failed: excluded from all scores",
}


def metric_words(metric: str) -> str:
    """A metric's display name."""
    return METRIC_WORDS.get(metric, metric.replace("_", " "))


def result_table(report: ReportFrames, metric: str = "exact_match") -> Table:
    """Systems by suites: means in percent with 95 % intervals; the best is marked if significantly better than the next."""
    best = report.best(metric)
    rows = []
    for label, evaluation in report.items():
        cells = [Cell(label)]
        for column in report.columns:
            if column not in evaluation.suites and column not in (ALL_SUITES, MACRO):
                cells.append(Cell(MISSING))
                continue
            mean, low, high = evaluation.estimate(metric, column)
            cells.append(Cell(percent(mean), interval(low, high), mark="better" if best.get(column) == label else ""))
        rows.append(cells)
    caption = f"{metric_words(metric)[:1].upper() + metric_words(metric)[1:]} in percent, with 95 % intervals."
    if best:
        caption += " Marked: better than the next (p < 0.05, paired by question, Holm-adjusted over columns)."
    return table_of([Cell("system"), *(_column(report, column) for column in report.columns)], rows, caption)


def _column(report: ReportFrames, column: str) -> Cell:
    if column == MACRO:
        return Cell(column, f"{len(report.suites)} suites")
    asked = [own for own in report.values() if column in own.suites or column == ALL_SUITES]
    counts = {
        own.questions if column == ALL_SUITES else own.by_question.filter(pl.col("suite") == column).height
        for own in asked
    }
    return Cell(column, counted(counts.pop(), "question") if len(counts) == 1 else "")


def metrics_table(report: ReportFrames) -> Table:
    """Systems by scores over all questions, plus pass@k if there are several samples."""
    column = ALL_SUITES if len(report.suites) > 1 else next(iter(report.suites), ALL_SUITES)
    most = min((own.samples_per_question for own in report.values()), default=0)
    rows = []
    for label, evaluation in report.items():
        estimates = [evaluation.estimate(metric, column) for metric in report.metrics]
        if most > 1:
            estimates.append(evaluation.pass_at(most))
        rows.append([label, *(Cell(percent(mean), interval(low, high)) for mean, low, high in estimates)])
    headings = ["system", *map(metric_words, report.metrics), *([f"pass@{most}"] if most > 1 else [])]
    return table_of(headings, rows, "All scores over all questions, in percent, with 95 % intervals.")


def comparison_table_of(frame: pl.DataFrame) -> Table:
    """The table of :meth:`Report.comparisons`."""
    rows = []
    for row in frame.iter_rows(named=True):
        mark = "" if row["p_holm"] >= SIGNIFICANT else "better" if row["difference"] > 0 else "worse"
        rows.append(
            (
                Cell(f"{row['before']} → {row['after']}"),
                Cell(row["suite"]),
                Cell(points(row["difference"]), interval(row["low"], row["high"], signed=True), mark),
                Cell(p_value(row["p_value"])),
                Cell(p_value(row["p_holm"])),
                Cell(number(row["better"])),
                Cell(number(row["worse"])),
                Cell(number(row["questions"])),
            )
        )
    headings = ["systems", "suite", "difference", "p", "p (Holm)", "better", "worse", "questions"]
    caption = "Differences in points of exact match, paired by question, with 95 % intervals."
    if any(row[2].mark for row in rows):
        caption += " Marked: p (Holm) < 0.05."
    return table_of(headings, rows, caption)


def stage_table(evaluations: Sequence[Evaluation]) -> Table:
    """Evaluations side by side, such as a run's stages; the column ``failed`` appears only if an episode failed."""
    any_failed = any(evaluation.failed for evaluation in evaluations)
    headings = ["stage", "questions", "exact match [95 %]", "F1", "turns/episode", "valid calls", "answer seen"]
    rows: list[list[str]] = []
    for own in evaluations:
        low, high = own.exact_match_interval
        samples = f" × {own.samples_per_question}" if own.samples_per_question > 1 else ""
        cells = [
            (own.exact_match, f"{own.exact_match:.1%} [{100 * low:.1f}, {100 * high:.1f}]"),
            (own.f1, f"{own.f1:.3f}"),
            (own.turns_per_episode, f"{own.turns_per_episode:.2f}"),
            (own.valid_call_fraction, f"{own.valid_call_fraction:.1%}"),
            (own.answer_in_passage, f"{own.answer_in_passage:.1%}"),
        ]
        shown = [MISSING if math.isnan(value) else text for value, text in cells]
        rows.append([own.label, f"{own.questions}{samples}", *shown, *([str(own.failed)] if any_failed else [])])
    return table_of([*headings, *(["failed"] if any_failed else [])], rows)


def outcome_table(report: ReportFrames) -> Table:
    """Systems by outcomes over all suites: shares of finished episodes, and counts."""
    frame = report.outcomes()
    shown = [outcome for outcome in OUTCOMES if outcome != "failed"]
    rows = []
    for label, evaluation in report.items():
        suite = ALL_SUITES if len(evaluation.suites) > 1 else next(iter(evaluation.suites), "")
        own = frame.filter((pl.col("system") == label) & (pl.col("suite") == suite))
        found = {row["outcome"]: row for row in own.iter_rows(named=True)}
        cells = [
            Cell(percent(found[o]["share"]), number(found[o]["episodes"])) if o in found else Cell(MISSING)
            for o in shown
        ]
        rows.append([Cell(label), *cells, Cell(number(evaluation.failed))])
    headings = ["system", *(OUTCOME_WORDS[outcome] for outcome in shown), "failed"]
    return table_of(headings, rows, "Outcomes: percent of the finished episodes, and their number.")


def cost_table(report: ReportFrames) -> Table:
    """Systems by cost per question over all suites."""
    rows = []
    for label, own in report.costs().group_by("system", maintain_order=True):
        row: Mapping[str, Any] = own.row(-1, named=True)  # the last row is over all suites
        dollars = f"${row['dollars']:.2g}" if row["dollars"] else ""
        rows.append(
            (
                Cell(str(label[0])),
                *(Cell(number(row[name], 2)) for name in ("turns", "searches")),
                Cell(number(row["prompt_tokens"]), f"{number(row['cached_prompt_tokens'])} cached"),
                Cell(number(row["sampled_tokens"])),
                *(Cell(number(row[name], 2)) for name in ("seconds", "sampling_seconds", "search_seconds")),
                Cell(dollars or MISSING, row["cost"]),
            )
        )
    headings = [
        *(
            "system",
            "turns",
            "searches",
            "prompt tokens",
            "sampled tokens",
            "seconds",
            "sampling seconds",
            "search seconds",
        ),
        Cell("dollars", "total"),
    ]
    return table_of(
        headings,
        rows,
        "Cost per question over all its samples: means over finished questions. Prompt tokens are summed over turns. Seconds are "
        "durations of single episodes, which ran concurrently.",
    )


def flip_rows(flips: pl.DataFrame, links: Mapping[tuple[str, str, str], str] | None = None) -> Table:
    """The table of flips; ``links`` are addresses by (suite, question, ``before`` or ``after``)."""
    links = links or {}
    rows = []
    for row in flips.iter_rows(named=True):
        sides = [
            Cell(
                "no answer" if row[f"{side}_answer"] is None else row[f"{side}_answer"],
                percent(row[side]) if 0 < row[side] < 1 else "",
                href=links.get((row["suite"], row["question_id"], side)),
            )
            for side in ("before", "after")
        ]
        golden = Cell(" / ".join(row["golden_answers"] or [])[:200])
        rows.append((Cell(row["question"]), Cell(row["suite"]), Cell(row["direction"]), *sides, golden))
    return table_of(["question", "suite", "", "before", "after", "golden answers"], rows)


def published_table(found: Beside) -> Table:
    """Our and published results by suite."""
    suites = found.frame["suite"].unique(maintain_order=True).to_list()
    rows = []
    for (row, kind), own in found.frame.group_by("row", "kind", maintain_order=True):
        cells = {each["suite"]: each for each in own.iter_rows(named=True)}
        shown = [
            Cell(percent(cells[suite]["exact_match"]), interval(cells[suite]["low"], cells[suite]["high"]))
            if suite in cells
            else Cell(MISSING)
            for suite in suites
        ]
        rows.append([Cell(str(row)), Cell(str(kind)), *shown])
    return table_of(["row", "", *suites], rows, "Exact match in percent. Published rows have no intervals.")


def condition_table(found: Beside) -> Table:
    """The conditions of each row, transposed to fit the page."""
    return table_of(found.conditions.columns, [list(map(str, row)) for row in found.conditions.iter_rows()])

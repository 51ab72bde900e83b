"""The tables of a report and of the stages of a run, the episodes that a report links to, and its sections in any form. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.episode_store import EpisodeKey
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.evaluation.report_notes import beside_published, notes_of
from searchr1_async.evaluation.table_forms import (
    FINISHED_OUTCOMES,
    MISSING,
    OUTCOME_WORDINGS,
    SCORE_WORDINGS,
    Cell,
    Table,
    interval,
    metric_words,
    number,
    one_line,
    p_value,
    percent,
    plain_table,
    table_of,
    table_of_rows,
)
from searchr1_async.records.scores import ALL_SUITES, COSTS, MACRO, OUTCOMES
from searchr1_async.runs.evaluation import Evaluation, compare
from searchr1_async.watch.markup import counted

SIGNIFICANT = 0.05

Cells = Mapping[tuple[str, str], Cell]
"""By row and column."""


def _grid(rows: Iterable[str], columns: Sequence[str], cells: Cells) -> list[list[Cell | str]]:
    return [[row, *(cells.get((row, column), Cell(MISSING)) for column in columns)] for row in rows]


def _estimated(mean: float | None, low: float | None, high: float | None) -> Cell:
    return Cell(percent(mean), interval(low, high))


# --- the tables of a report -------------------------------------------------------------------------------------------


def result_table(report: ReportFrames, metric: str = "exact_match") -> Table:
    """Systems by suites: means in percent with 95 % intervals."""
    cells = {(label, suite): _estimated(*own) for label, suite, *own in report.estimates(metric).iter_rows()}
    words = metric_words(metric)
    caption = f"{words[0].upper()}{words[1:]} in percent, with 95 % intervals."
    if len(report.suites) > 1:
        caption += f" “{ALL_SUITES}” weights all questions equally, “{MACRO}” all suites."
    headings = [Cell(column, _asked(report, column)) for column in report.columns]
    return table_of(["system", *headings], _grid(report, report.columns, cells), caption)


def _asked(report: ReportFrames, column: str) -> str:
    """How many questions a column has; empty if that depends on the system."""
    if column == MACRO:
        return f"{len(report.suites)} suites"
    asked = (
        own.by_question if column == ALL_SUITES else own.by_question.filter(suite=column) for own in report.values()
    )
    counts = {own.height for own in asked} - {0}
    return counted(counts.pop(), "question") if len(counts) == 1 else ""


def metrics_table(report: ReportFrames) -> Table:
    """Systems by scores over all questions, plus pass@k if there are several samples."""
    most = min(own.samples_per_question for own in report.values())
    passed = [f"pass@{most}"] if most > 1 else []
    cells = {
        (label, metric): _estimated(*own.estimate(metric)) for label, own in report.items() for metric in report.metrics
    }
    cells |= {(label, name): _estimated(*own.pass_at(most)) for label, own in report.items() for name in passed}
    headings = ["system", *map(metric_words, report.metrics), *passed]
    rows = _grid(report, [*report.metrics, *passed], cells)
    return table_of(headings, rows, "All scores over all questions, in percent, with 95 % intervals.")


def comparison_table_of(frame: pl.DataFrame) -> Table:
    """The table of :meth:`Report.comparisons`, at least one."""
    rows = []
    for row in frame.iter_rows(named=True):
        mark = "" if row["p_holm"] >= SIGNIFICANT else "better" if row["difference"] > 0 else "worse"
        cells: dict[str, Cell | str] = {
            "systems": f"{row['before']} → {row['after']}",
            "suite": row["suite"],
            "difference": Cell(percent(row["difference"], "+"), interval(row["low"], row["high"], "+"), mark),
            "p": p_value(row["p_value"]),
            "p (Holm)": p_value(row["p_holm"]),
        }
        rows.append(cells | {name: number(row[name]) for name in ("better", "worse", "questions")})
    caption = (
        "Differences in points of exact match, paired by question, with 95 % intervals. Holm adjusts p within each group of "
        f"comparisons: over “{ALL_SUITES}”, over “{MACRO}”, and over single suites. Marked: p (Holm) < {SIGNIFICANT}."
    )
    return table_of_rows(rows, caption)


def outcome_table(report: ReportFrames) -> Table:
    """Systems by outcomes over all suites: shares of finished episodes, and counts."""
    cells = {
        (row["system"], row["outcome"]): Cell(percent(row["share"]), number(row["episodes"]))
        for row in overall_outcomes(report).iter_rows(named=True)
    }
    cells |= {(label, "failed"): Cell(number(own.failed)) for label, own in report.items()}
    headings = ["system", *(OUTCOME_WORDINGS[name].words for name in FINISHED_OUTCOMES), "failed"]
    rows = _grid(report, [*FINISHED_OUTCOMES, "failed"], cells)
    return table_of(headings, rows, "Outcomes: percent of the finished episodes, and their number.")


def overall_outcomes(report: ReportFrames) -> pl.DataFrame:
    """The rows of :meth:`Report.outcomes` over all suites of a system, which are its last."""
    return report.outcomes().group_by("system", maintain_order=True).tail(len(OUTCOMES))


def cost_table(report: ReportFrames) -> Table:
    """Systems by cost per question over all suites."""
    forms = {name: ",.0f" if name.endswith("tokens") else ",.2f" for name in COSTS}
    rows = []
    for row in report.costs().group_by("system", maintain_order=True).last().iter_rows(named=True):
        dollars = Cell(f"${row['dollars']:.2g}" if row["dollars"] else MISSING, row["cost"])
        rows.append([row["system"], *(number(row[name], form) for name, form in forms.items()), dollars])
    caption = (
        "Cost per question over all its samples: means over finished questions. Prompt tokens are summed over turns. Seconds are "
        "durations of single episodes, which ran concurrently."
    )
    return table_of(["system", *(name.replace("_", " ") for name in COSTS), Cell("dollars", "total")], rows, caption)


def published_table(frame: pl.DataFrame) -> Table:
    """Our and published results by suite: the frame of :meth:`Report.beside`."""
    cells = {(f"{row} ({kind})", suite): _estimated(*own) for row, kind, suite, *own, _ in frame.iter_rows()}
    suites = frame["suite"].unique(maintain_order=True).to_list()
    rows = _grid(dict.fromkeys(row for row, _ in cells), suites, cells)
    return table_of(["row", *suites], rows, "Exact match in percent. Published rows have no intervals.")


# --- evaluations side by side, such as the stages of a run ------------------------------------------------------------


def stage_table(evaluations: Sequence[Evaluation]) -> Table:
    """One row per evaluation, at least one."""
    rows: list[dict[str, Cell | str]] = [
        {
            "stage": own.label,
            "questions": f"{own.questions}"
            + (f" × {own.samples_per_question}" if own.samples_per_question > 1 else ""),
            "exact match [95 %]": Cell(number(own.exact_match, ".1%"), interval(*own.exact_match_interval)),
            "F1": number(own.f1, ".3f"),
            "turns/episode": number(own.turns_per_episode, ".2f"),
            "valid calls": number(own.valid_call_fraction, ".1%"),
            "answer seen": number(own.answer_in_passage, ".1%"),
            "failed": str(own.failed),
        }
        for own in evaluations
    ]
    return table_of_rows(rows)


def comparison_table(evaluations: Sequence[Evaluation]) -> str:
    """Aligned plain text; the last line is the paired difference of the last two evaluations."""
    if not evaluations:
        return "no evaluations"
    return plain_table(replace(stage_table(evaluations), caption=difference_line(evaluations)))


def difference_line(evaluations: Sequence[Evaluation]) -> str:
    """The paired difference of the last two evaluations as text; empty for fewer than two."""
    if len(evaluations) < 2:
        return ""
    before, after = evaluations[-2:]
    name = f"{before.label} → {after.label}"
    try:
        found = compare(before, after)
    except ConfigurationError:
        return f"{name}: not paired, because the questions differ"
    return (
        f"{name}: {percent(found.mean, '+')} points {interval(*found.interval, '+')}, p {p_value(found.p_value)} "
        f"({found.method}); {found.improved} better and {found.worsened} worse of {found.questions} questions"
    )


# --- the episodes that a report links to -------------------------------------------------------------------------------

MAX_FLIPS = 50
"""Changed questions listed per pair of systems and direction: with 5 systems, 800 episodes or 3 MB."""
EPISODES_PER_OUTCOME = 4
"""Episodes listed per system and outcome, spread over suites."""


def _flips_part(before: str, after: str, flips: pl.DataFrame) -> Part:
    """The questions; answers lead to their episode, with the other one beside it."""
    rows = []
    shown = flips.filter(pl.int_range(pl.len()).over("direction") < MAX_FLIPS)
    for row in shown.iter_rows(named=True):
        old, new = _key(row, before, row["before_sample"]), _key(row, after, row["after_sample"])
        answers = {
            side: Cell(
                _answer(row[f"{side}_answer"]), percent(row[side]) if 0 < row[side] < 1 else "", episodes=episodes
            )
            for side, episodes in (("before", (old, new)), ("after", (new, old)))
        }
        asked = {"question": row["question"], "suite": row["suite"], "": row["direction"]}
        rows.append({**asked, **answers, "golden answers": _golden(row)})
    title = f"{one_line(before, 60)} → {one_line(after, 60)}: {counted(flips.height, 'question')} changed"
    title += f", {shown.height:,} shown" if shown.height < flips.height else ""
    return Part(table_of_rows(rows, wraps=True), title=title)


def _outcomes_part(label: str, scores: pl.DataFrame) -> Part:
    turn = pl.int_range(pl.len()).over("outcome", "suite")
    spread = scores.sort(pl.col("outcome").cast(pl.Enum(OUTCOMES)), turn, maintain_order=True)
    shown = spread.filter(pl.int_range(pl.len()).over("outcome") < EPISODES_PER_OUTCOME)
    rows: list[dict[str, Cell | str]] = [
        {
            "question": Cell(row["question"], episodes=(_key(row, label, row["sample"]),)),
            "suite": row["suite"],
            "outcome": OUTCOME_WORDINGS[row["outcome"]].words,
            "answer": _answer(row["answer"]),
            "golden answers": _golden(row),
        }
        for row in shown.iter_rows(named=True)
    ]
    return Part(table_of_rows(rows, wraps=True), title=f"Episodes of {one_line(label, 60)}")


def _key(row: Mapping[str, Any], label: str, sample: int) -> EpisodeKey:
    return label, row["suite"], row["question_id"], sample


def _answer(answer: str | None) -> str:
    return "no answer" if answer is None else answer


def _golden(row: Mapping[str, Any]) -> str:
    return " / ".join(row["golden_answers"] or [])[:200]


# --- the sections of a report ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a section."""

    table: Table | None = None
    notes: Sequence[str] = ()
    text: str = ""
    title: str = ""
    """If not empty, the page shows the piece folded under it, and LaTeX lacks it."""
    chart: str = ""
    """Name of a chart, which only the page shows."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    parts: list[Part]


def linked_episodes(sections: Sequence[Section]) -> set[EpisodeKey]:
    """The episodes that tables lead to."""
    tables = [part.table for section in sections for part in section.parts if part.table is not None]
    return {key for table in tables for row in table.rows for cell in row for key in cell.episodes}


def sections_of(report: ReportFrames) -> list[Section]:
    """The whole report."""
    if not report:
        return [Section("Results", [Part(text="This report has no systems.")])]
    created = [] if report.manifest is None else [f"started {report.manifest.created}"]
    facts = [counted(len(report), "system"), counted(len(report.suites), "suite"), *created]
    notes = Part(notes=notes_of(report))
    sections = [
        Section(
            "Exact match", [Part(result_table(report), text=" · ".join(facts)), Part(chart="exact_match.svg"), notes]
        ),
        Section("Differences", list(_differences(report))),
        Section("All scores", list(_scores(report))),
        Section("Outcomes", list(_outcomes(report))),
        Section("Costs", [Part(cost_table(report))]),
        Section("Beside published results", list(_published(report))),
        Section("Reproduction", list(_recorded(report.manifest, report.store is not None)) if report.manifest else []),
    ]
    return [section for section in sections if section.parts]


def _differences(report: ReportFrames) -> Iterator[Part]:
    comparisons = report.comparisons()
    if comparisons.height:
        yield Part(comparison_table_of(comparisons))
        yield from (_flips_part(*flips) for flips in report.all_flips() if flips[2].height)


def _scores(report: ReportFrames) -> Iterator[Part]:
    wordings = [SCORE_WORDINGS[metric] for metric in report.metrics]
    yield Part(metrics_table(report), notes=[f"{each.words}: {each.meaning}" for each in wordings])
    for metric in report.metrics[1:] if len(report.suites) > 1 else ():
        yield Part(result_table(report, metric), title=f"{metric_words(metric)} by suite")


def _outcomes(report: ReportFrames) -> Iterator[Part]:
    yield Part(outcome_table(report))
    yield Part(chart="outcomes.svg")
    yield Part(notes=[f"{each.words}: {each.meaning}" for each in OUTCOME_WORDINGS.values()])
    yield from (_outcomes_part(label, own.scores) for label, own in report.items() if own.scores.height)


def _published(report: ReportFrames) -> Iterator[Part]:
    found = beside_published(report)
    if "published" in found.frame["kind"]:
        yield Part(published_table(found.frame), notes=found.notes)
        conditions = table_of(found.conditions.columns, found.conditions.iter_rows(), wraps=True)
        yield Part(conditions, title="Conditions")


def _recorded(manifest: Manifest, is_kept: bool) -> Iterator[Part]:
    """What was measured: everything in the manifest but the questions' ids."""
    if is_kept:
        yield Part(
            text="evaluate(folder) repeats this evaluation from manifest.json and questions.parquet beside this file."
        )
    values = msgspec.to_builtins(manifest)
    for name, key in (("systems", "label"), ("suites", "name")):
        for record in values.pop(name):
            record.pop("question_ids", None)
            table = table_of(["", ""], _flat(record), wraps=True)
            yield Part(table, title=f"{name.capitalize()}: {one_line(record[key], 60)}")
    yield Part(table_of(["", ""], _flat(values), wraps=True), title="Settings")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)

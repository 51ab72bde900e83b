"""A report as Markdown and as LaTeX. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from searchr1_async.evaluation.render.parts import (
    comparison_table_of,
    condition_table,
    cost_table,
    flip_rows,
    metrics_table,
    outcome_table,
    published_table,
    result_table,
)
from searchr1_async.evaluation.render.text import latex_table, latex_text, markdown_table, markdown_text
from searchr1_async.evaluation.render.words import OUTCOME_MEANINGS, OUTCOME_WORDS
from searchr1_async.records.scores import OUTCOMES

if TYPE_CHECKING:
    from searchr1_async.evaluation.report import Report

_FLIPS = 20
"""Changed questions listed in a document; the page lists more."""


def markdown_report(report: Report) -> str:
    if not report:
        return "# Evaluation\n\nThis report has no systems.\n"
    comparisons, found = report.comparisons(), report.beside()
    parts = ["# Evaluation", markdown_table(result_table(report)), _notes(report.notes())]
    if comparisons.height:
        parts += ["## Differences", markdown_table(comparison_table_of(comparisons)), *_flips(report)]
    parts += ["## All scores", markdown_table(metrics_table(report))]
    parts += ["## Outcomes", markdown_table(outcome_table(report)), _meanings()]
    parts += ["## Costs", markdown_table(cost_table(report))]
    if (found.frame["kind"] == "published").any():
        parts += ["## Beside published results", markdown_table(published_table(found))]
        parts += [markdown_table(condition_table(found)), _notes(found.notes)]
    if (manifest := report.manifest) is not None:
        search = manifest.search or {}
        index = f"- index: {markdown_text(str(search.get('fingerprint')))}" if search else "- no search"
        facts = [
            *(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in manifest.versions.items()),
            *(
                f"- {markdown_text(s.name)}: {markdown_text(s.source)}, sha256 {s.sha256 or 'none'}"
                for s in manifest.suites
            ),
            index,
            f"- questions: sha256 {markdown_text(manifest.questions_sha256)}",
        ]
        kept = (
            ""
            if report.load_questions is None
            else "`await evaluate(folder)` repeats it from `manifest.json` and `questions.parquet` beside this file."
        )
        parts += ["## Reproduction", kept, "\n".join(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(notes: tuple[str, ...]) -> str:
    return "\n".join(f"- {markdown_text(note, 2000)}" for note in notes)


def _meanings() -> str:
    return "\n".join(f"- {OUTCOME_WORDS[outcome]}: {OUTCOME_MEANINGS[outcome]}" for outcome in OUTCOMES)


def _flips(report: Report) -> list[str]:
    parts = []
    for before, after in report.pairs():
        if not report.is_paired(before, after):
            continue
        flips = report.flips(before, after)
        if flips.height:
            shown = min(flips.height, _FLIPS)
            title = f"### {markdown_text(before)} → {markdown_text(after)}: {flips.height:,} questions changed"
            parts += [
                f"{title}, {shown} shown" if shown < flips.height else title,
                markdown_table(flip_rows(flips.head(_FLIPS))),
            ]
    return parts


def latex_report(report: Report) -> str:
    tables = {"exact-match": result_table(report)} if report else {}
    if report:
        comparisons = report.comparisons()
        if comparisons.height:
            tables["differences"] = comparison_table_of(comparisons)
        tables |= {"scores": metrics_table(report), "outcomes": outcome_table(report)}
    body = "\n".join(latex_table(table, label=f"tab:{name}") for name, table in tables.items())
    notes = "".join(f"% {latex_text(note, 2000)}\n" for note in report.notes())
    return f"% Needs \\usepackage{{booktabs}}; non-Latin labels need XeLaTeX or LuaLaTeX.\n{notes}\n{body}"

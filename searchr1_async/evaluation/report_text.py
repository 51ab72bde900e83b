"""A report in words: caveats as sentences, and the whole as Markdown, LaTeX or aligned text. Pure.

Labels and names are untrusted and escaped for each format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import shown_path
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.published import beside_published
from searchr1_async.evaluation.report_frames import ComparisonOf, ReportFrames
from searchr1_async.evaluation.report_tables import (
    OUTCOME_MEANINGS,
    OUTCOME_WORDS,
    Cell,
    Table,
    comparison_table_of,
    condition_table,
    cost_table,
    counted,
    flip_rows,
    metrics_table,
    one_line,
    outcome_table,
    published_table,
    result_table,
    stage_table,
)
from searchr1_async.records.scores import ALL_SUITES, MACRO, OUTCOMES
from searchr1_async.records.statistics import PairedDifference
from searchr1_async.runs.evaluation import Evaluation, compare
from searchr1_async.runs.weights import described_differences

_WRONG = ("search_failed", "reading_failed", "no_search", "no_answer")
_WRONG_WORDS = {
    "search_failed": "no search retrieved a golden answer",
    "reading_failed": "a golden answer was retrieved but not used",
    "no_search": "there was no valid search",
    "no_answer": "there was no parseable answer",
}


def notes_of(report: ReportFrames) -> tuple[str, ...]:
    """The notes, most important first; labels are single-line and not escaped."""
    found = [
        *_failures(report),
        *_training(report),
        *_overlap(report),
        *_questions(report),
        *_samples(report),
        *_comparisons(report),
        *_averages(report),
        *_judge(report),
        *_wrong(report),
        *(report.manifest.notes if report.manifest is not None else ()),
    ]
    return tuple(dict.fromkeys(found))


def _failures(report: ReportFrames) -> Iterator[str]:
    for label, evaluation in report.items():
        if evaluation.failed:
            yield (
                f"{one_line(label)}: {evaluation.failed:,} of {counted(evaluation.scores.height, 'episode')} failed "
                "because of a service and are excluded from all scores."
            )


def _training(report: ReportFrames) -> Iterator[str]:
    """Evaluation settings compared with training settings."""
    records = report.manifest.systems if report.manifest is not None else ()
    for record in records:
        label = one_line(record.label)
        if record.differences:
            yield (
                f"{label} is evaluated with other settings than in training: {described_differences(record.differences)}. Its "
                "scores are not comparable with its run's own evaluations."
            )
        if record.unrecorded:
            yield (
                f"The folder of {label}'s run, started by an older version, does not record {_listed(list(record.unrecorded))}: "
                "defaults are used instead."
            )
    for like in dict.fromkeys(record.like for record in records):
        played = [one_line(each.label) for each in records if each.like == like and not each.differences]
        if like is not None and played:
            yield f"Evaluated with the training settings of the run in {one_line(shown_path(like))}: {_listed(played)}."


def _overlap(report: ReportFrames) -> Iterator[str]:
    if report.manifest is None:
        return
    asked = {suite.name: len(suite.question_ids) for suite in report.manifest.suites}
    unknown, clean = [], []
    for record in report.manifest.systems:
        if record.overlap is None:
            if record.checkpoint is not None:
                unknown.append(one_line(record.label))
            continue
        seen = {suite: count for suite, count in record.overlap.items() if count}
        if not seen:
            clean.append(one_line(record.label))
        if seen:
            shares = ", ".join(
                f"{count:,} of {asked.get(suite, 0):,} in {one_line(suite)}" for suite, count in seen.items()
            )
            yield (
                f"{one_line(record.label)} was trained on some of these questions ({shares}): on those its score does not measure "
                "generalisation."
            )
    if clean:
        yield f"{_listed(clean)}: no exact or near duplicates between these questions and the training questions."
    if unknown:
        yield (
            f"The training questions of {_listed(unknown)} are unknown, so overlap with these questions was not checked."
        )


def _questions(report: ReportFrames) -> Iterator[str]:
    parts = []
    for suite in report.manifest.suites if report.manifest is not None else ():
        asked = len(suite.question_ids)
        if asked < suite.total:
            how = "the first" if suite.seed is None else f"seed {suite.seed}"
            parts.append(f"{one_line(suite.name)} {asked:,} of {suite.total:,} ({how})")
    if parts:
        yield f"Subset of the questions: {', '.join(parts)}."


def _samples(report: ReportFrames) -> Iterator[str]:
    most = max((evaluation.samples_per_question for evaluation in report.values()), default=0)
    settings: dict[str, Any] = {} if report.manifest is None else dict(report.manifest.settings)
    temperature = settings.get("temperature")
    at = "" if temperature is None else f" at temperature {temperature:g}"
    if most > 1:
        yield f"{most} samples per question{at}: a question's score is their mean, and intervals are over questions."
    elif most == 1 and temperature != 0:
        yield f"One sample per question{at}: resampling would change the scores somewhat; the intervals account for that."
    elif most == 1:
        yield "One greedy sample per question (temperature 0)."


def _comparisons(report: ReportFrames) -> Iterator[str]:
    pairs = [ComparisonOf(report[before], report[after]) for before, after in report.pairs()]
    unpaired = [one_line(pair.after.label) for pair in pairs if not pair.is_paired]
    if unpaired:
        first = one_line(pairs[0].before.label)
        yield f"Not compared with {first}, because the questions differ: {_listed(unpaired)}."
    paired = [pair for pair in pairs if pair.is_paired]
    suites = sum(len(pair.before.suites) for pair in paired)
    if suites > 1:
        several = any(len(pair.before.suites) > 1 for pair in paired)
        counts = f"{counted(len(paired), 'comparison')} over all questions, " if several else ""
        yield (
            "Differences are paired by question. P-values are Holm-adjusted within each group of comparisons: "
            f"{counts}{suites:,} of single suites."
        )


def _averages(report: ReportFrames) -> Iterator[str]:
    if len(report.suites) > 1:
        yield (
            f"“{ALL_SUITES}” weights all questions equally, so large suites count more; “{MACRO}” is the unweighted mean over the "
            f"{len(report.suites)} suites."
        )


def _judge(report: ReportFrames) -> Iterator[str]:
    if "judged" not in report.metrics:
        return
    model = (report.manifest.judge or {}).get("model") if report.manifest is not None else None
    by = f" by {one_line(str(model))}" if model else ""
    yield f"“Judged right” is the verdict of a judge model{by}; it supplements exact match."
    for label, evaluation in report.items():
        finished = evaluation.scores.filter(~pl.col("failed"))
        missing = finished["judged"].null_count()
        if missing:
            yield f"{one_line(label)}: {missing:,} of {counted(finished.height, 'episode')} have no readable verdict."


def _wrong(report: ReportFrames) -> Iterator[str]:
    for label, evaluation in report.items():
        counts = dict(evaluation.scores.group_by("outcome").len().iter_rows())
        wrong = sum(counts.get(outcome, 0) for outcome in _WRONG)
        if not wrong:
            continue
        ranked = sorted((o for o in _WRONG if counts.get(o)), key=lambda o: (-counts[o], _WRONG.index(o)))
        record = report.record(label)
        words = _WRONG_WORDS | ({"no_search": "the answer was wrong"} if record and record.method == "direct" else {})
        shares = "; ".join(
            f"{counts[outcome]:,} ({counts[outcome] / wrong:.0%}) {words[outcome]}" for outcome in ranked
        )
        yield f"{one_line(label)} was wrong in {counted(wrong, 'episode')}: {shares}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$^=-])")
_MARKDOWN_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "…": r"\ldots{}",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "−": "$-$",
    # After the end of a row, LaTeX reads a bracket as an option.
    "[": "{[}",
    "]": "{]}",
}


def markdown_text(text: str, longest: int = 500) -> str:
    """Untrusted text escaped as one line of Markdown.

    Colons, at signs and the dot of www become entities, because GitHub autolinks bare URLs and mentions.
    """
    shown = one_line(text, longest)
    shown = "".join(_MARKDOWN_ENTITIES.get(char, char) if char in "&<>" else char for char in shown)
    shown = _MARKDOWN.sub(r"\\\1", shown)
    shown = re.sub(r"(?<=\w)[:@]|[:@](?=\w|//)", lambda match: _MARKDOWN_ENTITIES[match[0]], shown)
    return re.sub(r"\b(www)\.", r"\1&#46;", shown, flags=re.IGNORECASE)


def markdown_table(table: Table) -> str:
    """A table in GitHub-flavoured Markdown."""
    lines = [
        "| " + " | ".join(map(_markdown_cell, table.headings)) + " |",
        "| " + " | ".join(["---", *["---:"] * (len(table.headings) - 1)]) + " |",
        *("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in table.rows),
    ]
    return "\n".join([*lines, *(["", markdown_text(table.caption)] if table.caption else [])])


def _markdown_cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    if cell.mark:
        text = f"**{text}**"
    return f"{text} {markdown_text(cell.detail)}".strip()


def latex_text(text: str, longest: int = 500) -> str:
    """Untrusted text escaped as one line of LaTeX."""
    return "".join(_LATEX.get(char, char) for char in one_line(text, longest))


def latex_table(table: Table, *, label: str) -> str:
    """A ``table`` environment that needs ``\\usepackage{booktabs}``; ``label`` is for ``\\ref``."""
    detailed = any(cell.detail for cell in table.headings)
    rows = [_latex_row(table.headings, [latex_text(cell.text) for cell in table.headings])]
    if detailed:
        rows.append(_latex_row(table.headings, [_small(cell.detail) for cell in table.headings]))
    body = [_latex_row(row, [_latex_cell(cell) for cell in row]) for row in table.rows]
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        f"  \\caption{{{latex_text(table.caption)}}}",
        f"  \\label{{{re.sub(r'[^A-Za-z0-9:-]', '-', label)}}}",
        r"  \small",
        f"  \\begin{{tabular}}{{l{'r' * (len(table.headings) - 1)}}}",
        r"    \toprule",
        *rows,
        r"    \midrule",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: tuple[Cell, ...], texts: list[str]) -> str:
    return "    " + " & ".join(texts) + r" \\"


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    if cell.mark:
        text = f"\\textbf{{{text}}}"
    return f"{text} {_small(cell.detail)}" if cell.detail else text


def _small(text: str) -> str:
    return f"{{\\scriptsize {latex_text(text)}}}" if text else ""


def plain_table(table: Table) -> str:
    """Aligned text; marked cells have a star."""
    lines = [[_plain_cell(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(text.ljust(width) if place == 0 else text.rjust(width) for place, (text, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    aligned.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*aligned, *([one_line(table.caption, 1000)] if table.caption else [])])


def _plain_cell(cell: Cell) -> str:
    text = one_line(cell.text) + ("*" if cell.mark else "")
    return f"{text} {one_line(cell.detail)}".rstrip()


def comparison_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    """The cells of :func:`~searchr1_async.evaluation.report_tables.stage_table` as text, by column heading."""
    table = stage_table(evaluations)
    names = [cell.text for cell in table.headings]
    return [dict(zip(names, [cell.text for cell in row], strict=True)) for row in table.rows]


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


_FLIPS = 20
"""Changed questions listed in a document; the page lists more."""


def markdown_report(report: ReportFrames) -> str:
    if not report:
        return "# Evaluation\n\nThis report has no systems.\n"
    comparisons, found = report.comparisons(), beside_published(report)
    parts = ["# Evaluation", markdown_table(result_table(report)), _notes(notes_of(report))]
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


def _flips(report: ReportFrames) -> list[str]:
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


def latex_report(report: ReportFrames) -> str:
    tables = {"exact-match": result_table(report)} if report else {}
    if report:
        comparisons = report.comparisons()
        if comparisons.height:
            tables["differences"] = comparison_table_of(comparisons)
        tables |= {"scores": metrics_table(report), "outcomes": outcome_table(report)}
    body = "\n".join(latex_table(table, label=f"tab:{name}") for name, table in tables.items())
    notes = "".join(f"% {latex_text(note, 2000)}\n" for note in notes_of(report))
    return f"% Needs \\usepackage{{booktabs}}; non-Latin labels need XeLaTeX or LuaLaTeX.\n{notes}\n{body}"

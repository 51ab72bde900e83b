"""What a careful reader must know of a report's figures, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.boundary.paths import shown_path
from searchr1_async.evaluation.compared import ComparisonOf
from searchr1_async.evaluation.figures import ALL_SUITES, MACRO
from searchr1_async.evaluation.render.tables import counted, one_line
from searchr1_async.trained import described_differences

if TYPE_CHECKING:
    from searchr1_async.evaluation.report import Report

_WRONG = ("search_failed", "reading_failed", "no_search", "no_answer")
_WRONG_WORDS = {
    "search_failed": "no search showed a golden answer",
    "reading_failed": "a golden answer was shown and not used",
    "no_search": "there was no valid search",
    "no_answer": "no answer could be read",
}


def notes_of(report: Report) -> tuple[str, ...]:
    """The sentences, the most important first; labels in them are on one line, and not escaped for any form."""
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


def _failures(report: Report) -> Iterator[str]:
    for label, evaluation in report.items():
        if evaluation.failed:
            yield (
                f"{one_line(label)}: {evaluation.failed:,} of {counted(evaluation.scores.height, 'episode')} failed "
                "(a service ended them) and are left out of every score."
            )


def _training(report: Report) -> Iterator[str]:
    """How the systems were played, beside how their runs were trained."""
    records = report.manifest.systems if report.manifest is not None else ()
    for record in records:
        label = one_line(record.label)
        if record.differences:
            yield (
                f"{label} is not played as it was trained: {described_differences(record.differences)}. Its figures are not "
                "those of its run's own measurements."
            )
        if record.unrecorded:
            yield (
                f"The folder of {label}'s run, which an earlier version began, does not say {_listed(list(record.unrecorded))}: the "
                "defaults stand for what it was trained with."
            )
    for like in dict.fromkeys(record.like for record in records):
        played = [one_line(each.label) for each in records if each.like == like and not each.differences]
        if like is not None and played:
            yield f"Played as the run in {one_line(shown_path(like))} was trained: {_listed(played)}."


def _overlap(report: Report) -> Iterator[str]:
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
                f"{one_line(record.label)} was trained on questions that are asked here ({shares}): on these its score is no "
                "measure of what it can do with new ones."
            )
    if clean:
        yield f"{_listed(clean)}: no question asked here is among those of its training, word for word or nearly so."
    if unknown:
        yield (
            f"What {_listed(unknown)} was trained on is not known here, so nobody has looked whether questions asked here were "
            "among it."
        )


def _questions(report: Report) -> Iterator[str]:
    parts = []
    for suite in report.manifest.suites if report.manifest is not None else ():
        asked = len(suite.question_ids)
        if asked < suite.total:
            how = "the first" if suite.seed is None else f"seed {suite.seed}"
            parts.append(f"{one_line(suite.name)} {asked:,} of {suite.total:,} ({how})")
    if parts:
        yield f"Not every question was asked: {', '.join(parts)}."


def _samples(report: Report) -> Iterator[str]:
    most = max((evaluation.samples_per_question for evaluation in report.values()), default=0)
    settings: dict[str, Any] = {} if report.manifest is None else dict(report.manifest.settings)
    temperature = settings.get("temperature")
    at = "" if temperature is None else f" at temperature {temperature:g}"
    if most > 1:
        yield f"{most} samples a question{at}: a question's score is their mean, and intervals are over questions."
    elif most == 1 and temperature != 0:
        yield f"One sample a question{at}: another draw of answers would give somewhat other figures, which the intervals allow for."
    elif most == 1:
        yield "One greedy answer a question (temperature 0)."


def _comparisons(report: Report) -> Iterator[str]:
    pairs = [ComparisonOf(report[before], report[after]) for before, after in report.pairs()]
    unpaired = [one_line(pair.after.label) for pair in pairs if not pair.is_paired]
    if unpaired:
        first = one_line(pairs[0].before.label)
        yield f"{_listed(unpaired)} was asked other questions than {first}: not compared with it."
    paired = [pair for pair in pairs if pair.is_paired]
    suites = sum(len(pair.before.suites) for pair in paired)
    if suites > 1:
        several = any(len(pair.before.suites) > 1 for pair in paired)
        counts = f"{counted(len(paired), 'comparison')} over all questions, " if several else ""
        yield (
            "Differences are paired by question. Where there are several comparisons the p-values are adjusted by Holm's method: "
            f"{counts}{suites:,} of single suites."
        )


def _averages(report: Report) -> Iterator[str]:
    if len(report.suites) > 1:
        yield (
            f"“{ALL_SUITES}” counts every question alike, so that large suites weigh more; “{MACRO}” is the plain mean over the "
            f"{len(report.suites)} suites."
        )


def _judge(report: Report) -> Iterator[str]:
    if "judged" not in report.metrics:
        return
    model = (report.manifest.judge or {}).get("model") if report.manifest is not None else None
    by = f" by {one_line(str(model))}" if model else ""
    yield f"“Judged right” is the verdict of a model{by}; it stands beside exact match and replaces nothing."
    for label, evaluation in report.items():
        finished = evaluation.scores.filter(~pl.col("failed"))
        missing = finished["judged"].null_count()
        if missing:
            yield f"{one_line(label)}: no verdict could be read for {missing:,} of {counted(finished.height, 'episode')}."


def _wrong(report: Report) -> Iterator[str]:
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

"""Caveats about a report's results, as sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.boundary.paths import shown_path
from searchr1_async.evaluation.compared import ComparisonOf
from searchr1_async.evaluation.render.tables import counted, one_line
from searchr1_async.records.scores import ALL_SUITES, MACRO
from searchr1_async.runs.weights import described_differences

if TYPE_CHECKING:
    from searchr1_async.evaluation.report import Report

_WRONG = ("search_failed", "reading_failed", "no_search", "no_answer")
_WRONG_WORDS = {
    "search_failed": "no search retrieved a golden answer",
    "reading_failed": "a golden answer was retrieved but not used",
    "no_search": "there was no valid search",
    "no_answer": "there was no parseable answer",
}


def notes_of(report: Report) -> tuple[str, ...]:
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


def _failures(report: Report) -> Iterator[str]:
    for label, evaluation in report.items():
        if evaluation.failed:
            yield (
                f"{one_line(label)}: {evaluation.failed:,} of {counted(evaluation.scores.height, 'episode')} failed "
                "because of a service and are excluded from all scores."
            )


def _training(report: Report) -> Iterator[str]:
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
                f"{one_line(record.label)} was trained on some of these questions ({shares}): on those its score does not measure "
                "generalisation."
            )
    if clean:
        yield f"{_listed(clean)}: no exact or near duplicates between these questions and the training questions."
    if unknown:
        yield (
            f"The training questions of {_listed(unknown)} are unknown, so overlap with these questions was not checked."
        )


def _questions(report: Report) -> Iterator[str]:
    parts = []
    for suite in report.manifest.suites if report.manifest is not None else ():
        asked = len(suite.question_ids)
        if asked < suite.total:
            how = "the first" if suite.seed is None else f"seed {suite.seed}"
            parts.append(f"{one_line(suite.name)} {asked:,} of {suite.total:,} ({how})")
    if parts:
        yield f"Subset of the questions: {', '.join(parts)}."


def _samples(report: Report) -> Iterator[str]:
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


def _comparisons(report: Report) -> Iterator[str]:
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


def _averages(report: Report) -> Iterator[str]:
    if len(report.suites) > 1:
        yield (
            f"“{ALL_SUITES}” weights all questions equally, so large suites count more; “{MACRO}” is the unweighted mean over the "
            f"{len(report.suites)} suites."
        )


def _judge(report: Report) -> Iterator[str]:
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

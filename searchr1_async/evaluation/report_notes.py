"""The caveats of a report: notes on its results; and published results, with the conditions in which they differ. Pure.

``published.json`` has the published rows. They contain only what their source states; everything else is None ("not stated"). They are
never ranked against ours, only shown beside them with the differing conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from searchr1_async.boundary.paths import shown_path
from searchr1_async.data.hub import SUITES
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.evaluation.report_frames import ReportFrames, have_same_questions
from searchr1_async.evaluation.table_forms import one_line
from searchr1_async.runs.weights import described_differences
from searchr1_async.watch.markup import counted


def notes_of(report: ReportFrames) -> tuple[str, ...]:
    """The notes, most important first; labels are single-line and not escaped."""
    manifest = report.manifest
    found = [*_gaps(report), *_comparisons(report)]
    if manifest is not None:
        found += [note for record in manifest.systems for note in _training(record)]
        found += [note for record in manifest.systems for note in _overlap(record, manifest)]
        found += [*_sampling(manifest), *manifest.notes]
    return tuple(dict.fromkeys(found))


def _gaps(report: ReportFrames) -> Iterator[str]:
    """Episodes and verdicts that are missing."""
    for label, evaluation in report.items():
        episodes = evaluation.scores.height
        if failed := evaluation.failed:
            yield (
                f"{one_line(label)}: {failed:,} of {counted(episodes, 'episode')} failed because of a service and are excluded "
                "from all scores."
            )
        unread = evaluation.scores.filter(~pl.col("failed"))["judged"].null_count()
        if unread and "judged" in report.metrics:
            yield f"{one_line(label)}: {unread:,} of {counted(episodes - failed, 'episode')} have no readable verdict."


def _comparisons(report: ReportFrames) -> Iterator[str]:
    for before, after in report.pairs():
        if not have_same_questions(before, after):
            yield f"Not compared with {one_line(before.label)}, because the questions differ: {one_line(after.label)}."


def _training(record: SystemRecord) -> Iterator[str]:
    """Evaluation settings compared with training settings."""
    label = one_line(record.label)
    if record.differences:
        yield (
            f"{label} is evaluated with other settings than in training: {described_differences(record.differences)}. Its "
            "scores are not comparable with its run's own evaluations."
        )
    elif record.like is not None:
        yield f"{label} is evaluated with the training settings of the run in {one_line(shown_path(record.like))}."
    if record.unrecorded:
        yield f"The folder of {label}'s run does not record {', '.join(record.unrecorded)}: defaults are used instead."


def _overlap(record: SystemRecord, manifest: Manifest) -> Iterator[str]:
    asked = {suite.name: len(suite.question_ids) for suite in manifest.suites}
    label, seen = one_line(record.label), record.overlap or {}
    shares = [f"{count:,} of {asked[suite]:,} in {one_line(suite)}" for suite, count in seen.items() if count]
    if shares:
        yield (
            f"{label} was trained on some of these questions ({', '.join(shares)}): on those its score does not measure "
            "generalisation."
        )
    elif record.overlap is not None:
        yield f"{label}: no duplicates between these questions and the training questions."
    elif record.checkpoint is not None:
        yield f"The training questions of {label} are unknown, so overlap with these questions was not checked."


def _sampling(manifest: Manifest) -> Iterator[str]:
    """Which questions were asked, and how often."""
    parts = [
        f"{one_line(suite.name)} {len(suite.question_ids):,} of {suite.total:,} "
        f"({'the first' if suite.seed is None else f'seed {suite.seed}'})"
        for suite in manifest.suites
        if len(suite.question_ids) < suite.total
    ]
    if parts:
        yield f"Subset of the questions: {', '.join(parts)}."
    yield (
        f"{counted(manifest.settings['samples'], 'sample')} per question at temperature {manifest.settings['temperature']:g}: a "
        "question's score is the mean of its samples, and intervals are over questions."
    )


# --- published results --------------------------------------------------------------------------------------------------

NOT_STATED = "not stated"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One published row of results; None if the source does not state it."""

    name: str
    scores: Mapping[str, float]
    """Exact match per suite, 0 to 1."""
    source: str
    model: str | None = None
    training: str | None = None
    corpus: str | None = None
    index: str | None = None
    embedder: str | None = None
    n_results: int | str | None = None
    prompt: str | None = None
    max_turns: int | None = None
    questions: str | None = None
    """Number of questions, as text."""
    samples: int | None = None
    temperature: float | None = None
    mean: float | None = None
    """Mean exact match of the seven suites, as reported: over suites or over questions."""
    remarks: tuple[str, ...] = ()

    @property
    def mean_percent(self) -> str | None:
        return None if self.mean is None else f"{100 * self.mean:.1f}"


@dataclass(frozen=True, slots=True)
class _Published:
    rows: tuple[PublishedRow, ...]


PUBLISHED = msgspec.json.decode(Path(__file__).with_name("published.json").read_bytes(), type=_Published).rows


@dataclass(frozen=True, slots=True)
class Beside:
    frame: pl.DataFrame
    """``row``, ``kind`` (``ours``, ``published``), ``suite``, ``exact_match``, ``low``, ``high``, ``questions`` (null if not
    stated), for suites that both sides have."""
    conditions: pl.DataFrame
    """``condition``, then one column per row with its value as text."""
    notes: tuple[str, ...]


def beside_published(report: ReportFrames, published: Sequence[PublishedRow] | None = None) -> Beside:
    rows = tuple(PUBLISHED if published is None else published)
    suites = [suite for suite in report.suites if any(suite in row.scores for row in rows)]
    has_all = set(SUITES) <= set(suites)
    rows = tuple(row for row in rows if (any(suite in row.scores for suite in suites) if row.scores else has_all))
    ours = [_ours(report, label, _questions(report, suites)) for label in report]
    conditions: dict[str, list[str]] = {"condition": [*_CONDITIONS]}
    for row in (*ours, *rows):
        name = row.name if row.name not in conditions else f"{row.name} (published)"
        conditions[name] = [_text(getattr(row, field)) for field in _CONDITIONS.values()]
    return Beside(_frame(report, rows, suites), pl.DataFrame(conditions), tuple(_remarks(rows)))


def _frame(report: ReportFrames, rows: Sequence[PublishedRow], suites: Sequence[str]) -> pl.DataFrame:
    finished = [
        own.by_question.filter(pl.col("finished") > 0).group_by("suite").agg(system=pl.lit(label), questions=pl.len())
        for label, own in report.items()
    ]
    ours = report.estimates().filter(pl.col("suite").is_in(suites)).fill_nan(None)
    if finished:
        ours = ours.join(pl.concat(finished), on=["system", "suite"], how="left", maintain_order="left")
    cells = [(label, "ours", *own) for label, *own in ours.iter_rows()]
    cells += [
        (row.name, "published", suite, row.scores[suite], None, None, None)
        for row in rows
        for suite in suites
        if suite in row.scores
    ]
    schema = {"row": pl.String, "kind": pl.String, "suite": pl.String}
    schema |= dict.fromkeys(("exact_match", "low", "high"), pl.Float64) | {"questions": pl.Int64}
    return pl.DataFrame(cells, schema=schema, orient="row")


_CONDITIONS = {
    "model": "model",
    "training": "training",
    "prompt": "prompt",
    "corpus": "corpus",
    "embedder": "embedder",
    "passages per search": "n_results",
    "max turns": "max_turns",
    "samples per question": "samples",
    "temperature": "temperature",
    "questions": "questions",
    "mean of the suites, as reported": "mean_percent",
    "source": "source",
}
"""Each condition that is shown, and the field of a published row that states it."""

_METHOD_WORDS = {
    "search": "ours, with the search tool",
    "direct": "ours, without search",
    "rag": "ours, one search with the question itself",
    "recipe": "recipe",
}


def _ours(report: ReportFrames, label: str, questions: str) -> PublishedRow:
    """The conditions of a system of ours, as far as they were recorded."""
    manifest, record = report.manifest, report.record(label)
    if manifest is None or record is None:
        return PublishedRow(label, {}, "this report", questions=questions)
    settings, method = manifest.settings, record.method
    search: Mapping[str, Any] = manifest.search or {}
    if method == "direct":
        search = dict.fromkeys(("source", "embedder", "n_results"), "none")
    step = "" if record.step is None else f", step {record.step}"
    limits = record.limits or settings.get("limits") or {}  # a system's own limits override the evaluation's
    return PublishedRow(
        label,
        {},
        "this report",
        model=record.model,
        training="none: the base model" if record.checkpoint is None else f"a run of ours{step}",
        corpus=_corpus(search),
        embedder=search.get("embedder"),
        n_results=search.get("n_results"),
        prompt=record.instructions or _METHOD_WORDS[method],
        max_turns=1 if method in ("direct", "rag") else limits.get("max_turns"),
        questions=questions,
        samples=settings.get("samples"),
        temperature=settings.get("temperature"),
    )


def _corpus(search: Mapping[str, Any]) -> str | None:
    # Only the last part of a path means anything to others.
    name = str(search.get("source", "")).replace("\\", "/").rstrip("/").rpartition("/")[2]
    passages = search.get("passages")
    return f"{name} ({passages:,} passages)" if name and isinstance(passages, int) else name or None


def _text(value: Any) -> str:
    return NOT_STATED if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def _questions(report: ReportFrames, suites: Sequence[str]) -> str:
    """``nq 500 of 3,610``, …"""
    totals = {} if report.manifest is None else {suite.name: suite.total for suite in report.manifest.suites}
    asked = {suite: max(own.by_question.filter(suite=suite).height for own in report.values()) for suite in suites}
    return ", ".join(f"{suite} {count:,} of {max(count, totals.get(suite, 0)):,}" for suite, count in asked.items())


def _remarks(rows: Sequence[PublishedRow]) -> Iterator[str]:
    if rows:
        yield "Published rows stand beside ours and are not ranked: their conditions differ, or their source does not state them."
    remarks: dict[str, list[str]] = {}
    for row in rows:
        for remark in row.remarks:
            remarks.setdefault(remark, []).append(row.name)
    yield from (f"{', '.join(names)}: {remark}" for remark, names in remarks.items())

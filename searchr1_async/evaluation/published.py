"""Published exact match of search-trained models, and how their conditions differ from a report's. Pure.

``published.json`` has the rows. They contain only what their source states; everything else is None ("not stated"). Published rows
are never ranked against ours, only shown beside them with the differing conditions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.evaluation.report_frames import ReportFrames

NOT_STATED = "not stated"
NOT_RECORDED = "not recorded"


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
    n_results: int | None = None
    prompt: str | None = None
    max_turns: int | None = None
    questions: str | None = None
    """Number of questions, as text."""
    samples: int | None = None
    temperature: float | None = None
    remarks: tuple[str, ...] = field(default=())


def _read() -> tuple[PublishedRow, ...]:
    """The rows of ``published.json``, which says where they are from."""
    data = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(PublishedRow(**{**row, "remarks": tuple(row.get("remarks", ()))}) for row in data["rows"])


PUBLISHED = _read()


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
    rows = tuple(row for row in rows if any(suite in row.scores for suite in suites))
    return Beside(_frame(report, rows, suites), _conditions(report, rows, suites), _notes(report, rows, suites))


def _frame(report: ReportFrames, rows: Sequence[PublishedRow], suites: Sequence[str]) -> pl.DataFrame:
    cells = []
    for label, evaluation in report.items():
        for suite in (suite for suite in suites if suite in evaluation.suites):
            finished = evaluation.by_question.filter((pl.col("suite") == suite) & (pl.col("finished") > 0)).height
            cells.append((label, "ours", suite, *evaluation.estimate("exact_match", suite), finished))
    cells += [
        (row.name, "published", suite, row.scores[suite], None, None, None)
        for row in rows
        for suite in suites
        if suite in row.scores
    ]
    schema = {"row": pl.String, "kind": pl.String, "suite": pl.String}
    schema |= dict.fromkeys(("exact_match", "low", "high"), pl.Float64) | {"questions": pl.Int64}
    return pl.DataFrame(cells, schema=schema, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))


# --- conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Condition:
    name: str
    ours: Callable[[Manifest, SystemRecord], str | None]
    theirs: Callable[[PublishedRow], str | None]
    is_same: Callable[[str, str], bool] = lambda ours, theirs: ours == theirs


def _text(value: Any) -> str | None:
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _searches(record: SystemRecord) -> bool:
    return record.method != "direct"


def _of_search(name: str) -> Callable[[Manifest, SystemRecord], str | None]:
    def read(manifest: Manifest, record: SystemRecord) -> str | None:
        return _text((manifest.search or {}).get(name)) if _searches(record) else "none"

    return read


def _corpus(manifest: Manifest, record: SystemRecord) -> str | None:
    if not _searches(record):
        return "none"
    search = manifest.search or {}
    passages = search.get("passages")
    # Only the last part of a path means anything to others.
    name = str(search.get("source", "")).replace("\\", "/").rstrip("/").rpartition("/")[2]
    count = "" if not isinstance(passages, int) else f" ({passages:,} passages)"
    return f"{name}{count}" if name else None


def _turns(manifest: Manifest, record: SystemRecord) -> str | None:
    if record.method in ("direct", "rag"):
        return "1"
    # A system's own limits override the evaluation's.
    return _text((record.limits or manifest.settings.get("limits") or {}).get("max_turns"))


def _ends_alike(ours: str, theirs: str) -> bool:
    """``Qwen/Qwen2.5-7B-Instruct`` and ``Qwen2.5-7B-Instruct``."""
    return ours.rpartition("/")[2].lower() == theirs.rpartition("/")[2].lower()


def _training(_: Manifest, record: SystemRecord) -> str | None:
    if record.checkpoint is None:
        return "none: the base model"
    return "a run of ours" + (f", step {record.step}" if record.step is not None else "")


_METHOD_WORDS = {
    "search": "ours, with the search tool",
    "direct": "ours, without search",
    "rag": "ours, one search with the question itself",
    "recipe": "recipe",
}

CONDITIONS: tuple[_Condition, ...] = (
    _Condition("model", lambda _, record: record.model, lambda row: row.model, _ends_alike),
    _Condition("training", _training, lambda row: row.training),
    _Condition("prompt", lambda _, r: r.instructions or _METHOD_WORDS.get(r.method, r.method), lambda row: row.prompt),
    _Condition("corpus", _corpus, lambda row: row.corpus),
    _Condition("embedder", _of_search("embedder"), lambda row: row.embedder, lambda a, b: b.lower() in a.lower()),
    _Condition("passages per search", _of_search("n_results"), lambda row: _text(row.n_results)),
    _Condition("max turns", _turns, lambda row: _text(row.max_turns)),
    _Condition("samples per question", lambda m, _: _text(m.settings.get("samples")), lambda row: _text(row.samples)),
    _Condition("temperature", lambda m, _: _text(m.settings.get("temperature")), lambda row: _text(row.temperature)),
)


def _questions(report: ReportFrames, suites: Sequence[str]) -> str:
    """``nq 500 of 3,610``, …"""
    totals = {} if report.manifest is None else {suite.name: suite.total for suite in report.manifest.suites}
    asked = {
        suite: max(own.by_question.filter(pl.col("suite") == suite).height for own in report.values())
        for suite in suites
    }
    return ", ".join(
        f"{suite} {count:,}" + (f" of {totals[suite]:,}" if totals.get(suite, count) > count else "")
        for suite, count in asked.items()
    )


def _conditions(report: ReportFrames, rows: Sequence[PublishedRow], suites: Sequence[str]) -> pl.DataFrame:
    columns: dict[str, list[str]] = {"condition": [*(each.name for each in CONDITIONS), "questions"]}
    for label in report:
        columns[label] = [
            *(_ours(report, label, each) or NOT_RECORDED for each in CONDITIONS),
            _questions(report, suites),
        ]
    for row in rows:
        name = row.name if row.name not in columns else f"{row.name} (published)"
        columns[name] = [
            *(each.theirs(row) or NOT_STATED for each in CONDITIONS),
            row.questions or NOT_STATED,
        ]
    return pl.DataFrame(columns)


def _ours(report: ReportFrames, label: str, condition: _Condition) -> str | None:
    record = report.record(label)
    if report.manifest is None or record is None:
        return None
    return condition.ours(report.manifest, record)


def _notes(report: ReportFrames, rows: Sequence[PublishedRow], suites: Sequence[str]) -> tuple[str, ...]:
    if not rows or not report:
        return ()
    if report.manifest is None:
        return (
            "There is no manifest, so our conditions are not recorded and differences from the published rows are unknown: the "
            "results are not a ranking.",
        )
    notes = [_note(report, row, suites) for row in rows]
    remarks: dict[str, list[str]] = {}
    for row in rows:
        for remark in row.remarks:
            remarks.setdefault(remark, []).append(row.name)
    return (*notes, *(f"{', '.join(names)}: {remark}" for remark, names in remarks.items()))


def _note(report: ReportFrames, row: PublishedRow, suites: Sequence[str]) -> str:
    differing, unknown = [], []
    for condition in CONDITIONS:
        theirs = condition.theirs(row)
        ours = {label: _ours(report, label, condition) for label in report}
        if theirs is None:
            unknown.append(condition.name)
            continue
        others = {
            label: value for label, value in ours.items() if value is None or not condition.is_same(value, theirs)
        }
        if not others:
            continue
        shown = " / ".join(dict.fromkeys(_short(value or NOT_RECORDED) for value in others.values()))
        some = "" if len(others) == len(ours) else f" for {', '.join(map(_short, others))}"
        differing.append(f"{condition.name} ({shown}{some}; theirs: {_short(theirs)})")
    if row.questions is None:
        unknown.append("number of questions")
    elif row.questions != _questions(report, suites):
        differing.append(f"questions ({_questions(report, suites)}; theirs: {row.questions})")
    parts = [f"ours differs in {'; '.join(differing)}" if differing else "no known difference"]
    if unknown:
        parts.append(f"its source does not state {', '.join(unknown)}")
    # Rows are comparable only if nothing differs and nothing is unknown.
    verdict = "." if not differing and not unknown else ". The results are shown side by side, not ranked."
    return f"{row.name}: {'. '.join(part[:1].upper() + part[1:] for part in parts)}{verdict}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"

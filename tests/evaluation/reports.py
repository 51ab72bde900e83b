"""Hand-made reports: scores, optionally with episodes, without rollouts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import write_parquet
from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.evaluation.episode_store import QUESTIONS_NAME, EpisodeStore, questions_frame
from searchr1_async.evaluation.manifest import Manifest, SuiteRecord, SystemRecord
from searchr1_async.evaluation.report import Report
from searchr1_async.records.scores import SCORE_SCHEMA
from searchr1_async.runs.evaluation import Evaluation
from tests.watch.builders import answering_turn, searching_turn

Row = tuple[str, str, float | None]
"""Suite, question, exact match (None: the episode failed)."""


def scores(label: str, rows: Sequence[Row], **changes: Any) -> pl.DataFrame:
    """A scores frame; repeated questions are samples."""
    seen: dict[tuple[str, str], int] = {}
    out = []
    for suite, name, score in rows:
        sample = seen[suite, name] = seen.get((suite, name), -1) + 1
        is_right = score is not None and score >= 0.5
        outcome = "failed" if score is None else "right_seen" if is_right else "search_failed"
        out.append(
            {
                **dict.fromkeys(SCORE_SCHEMA),
                "system": label,
                "suite": suite,
                "question_id": name,
                "question": f"What is the capital of {name}?",
                "golden_answers": ["Paris"],
                "sample": sample,
                "failed": score is None,
                "stop_reason": "failed" if score is None else "answer",
                "answer": None if score is None else "Paris" if is_right else "Rome",
                "exact_match": score,
                "f1": score,
                "cover_match": score,
                "format": None if score is None else 1.0,
                **{"turns": 2, "searches": 1, "calls": 1, "malformed_calls": 0},
                **{"prompt_tokens": 1000, "sampled_tokens": 100},
                **{"seconds": 2.0, "sampling_seconds": 1.5, "search_seconds": 0.5},
                "answer_in_passage": is_right,
                "outcome": outcome,
                **changes,
            }
        )
    return pl.DataFrame(out, schema=SCORE_SCHEMA)


def evaluation(label: str, rows: Sequence[Row], **changes: Any) -> Evaluation:
    return Evaluation(label, scores(label, rows, **changes))


def rows_of(suite: str, right: int, of: int) -> list[Row]:
    """The first ``right`` questions are right, the others wrong."""
    return [(suite, f"q{number}", float(number < right)) for number in range(of)]


def report(**systems: Sequence[Row]) -> Report:
    return Report([evaluation(label.replace("_", " "), rows) for label, rows in systems.items()])


def manifest(report: Report, **changes: Any) -> Manifest:
    """The manifest of a report, as for a small model on the embedded service."""
    suites = []
    for suite in report.suites:
        first = next(own for own in report.values() if suite in own.suites)
        ids = tuple(first.by_question.filter(suite=suite)["question_id"].to_list())
        suites.append(SuiteRecord(suite, f"/data/{suite}.jsonl", "0" * 64, len(ids), None, None, None, ids))
    values: dict[str, Any] = {
        "created": "2026-11-23T00:00:00+00:00",
        "versions": {"searchr1_async": "1.0", "python": "3.11.9"},
        "service": {"embedded": True, "host": None},
        "search": {
            "fingerprint": "abc", "embedder": "minilm", "source": "/data/corpus.parquet", "passages": 54_909,
            "n_results": 3, "max_passage_words": 100, "description": "Wikipedia",
        },
        "settings": {"samples": 1, "temperature": 0.0, "seed": 0, "limits": {"max_turns": 5, "max_tokens": 1024}},
        "suites": tuple(suites),
        "systems": tuple(SystemRecord(label, "search", "tiny/tiny-1M") for label in report),
        "questions_sha256": "1" * 64,
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def figures(report: Report) -> str:
    """All results as JSON, without what differs between two sessions: timings, dates, versions, prices and cache hits."""
    volatile = ("second", "dollar", "cached")
    costs = report.costs().drop("cost")
    values: dict[str, Any] = {
        "scores": report.frame().rows(),
        "comparisons": report.comparisons().rows(),
        "flips": [(before, after, flips.rows()) for before, after, flips in report.all_flips()],
        "outcomes": report.outcomes().rows(),
        "costs": costs.select(name for name in costs.columns if not any(word in name for word in volatile)).rows(),
        "notes": report.notes(),
        "manifest": None if report.manifest is None else asdict(replace(report.manifest, created="", versions={})),
    }
    return json.dumps(values, default=str)


def rows_of_episodes(label: str, episodes: Sequence[Episode]) -> list[EpisodeRow]:
    """One episode of each question."""
    return [EpisodeRow(each, label=label, group=place, member=0, trained=False) for place, each in enumerate(episodes)]


def kept(report: Report, folder: Path | None = None) -> Report:
    """The report with its episodes in a store."""
    store = EpisodeStore(folder)
    for label, own in report.items():
        store.write(rows_of_episodes(label, own.episodes))
    write_parquet(
        store.folder / QUESTIONS_NAME, questions_frame([e.question for e in next(iter(report.values())).episodes])
    )
    return Report(list(report.values()), report.manifest, store)


def played(
    label: str, share: float, *, of: int = 40, suites: Sequence[str] = ("nq", "hotpotqa"), said: str = "", seed: int = 0
) -> Evaluation:
    """An evaluation with episodes in memory; ``said`` is in all their texts."""
    rng = random.Random(repr((label, seed)))
    episodes = []
    for suite in suites:
        for number in range(of):
            asked = Question(f"q{number}{said}", f"What is the capital of {number}? {said}", (f"Paris{said}",), suite)
            is_right, is_seen = rng.random() < share, rng.random() < 0.6
            answer = f"Paris{said}" if is_right else f"Rome{said}"
            turns = (
                searching_turn(f"The answer is {asked.golden_answers[0]}." if is_seen else "Nothing."),
                answering_turn(f"Answer: {answer}"),
            )
            parts = {"correct": float(is_right), "format": 1.0, "f1": float(is_right), "cover": float(is_right)}
            episodes.append(
                Episode(asked, (1, 2, 3), turns, StopReason.ANSWER, answer, float(is_right), parts, None, 2.0)
            )
    return Evaluation.of(label, episodes)

"""Per-episode scores of an evaluation, from which all metrics are computed. Pure.

Scores are small enough to keep in memory for full suites; the episodes stay on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import polars as pl

from searchr1_async.billing import sampling_usage
from searchr1_async.episodes.rewards import cover_match, exact_match, f1_score
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Episode
from searchr1_async.watch.metrics import answer_in_passage, passages_shown

METRICS = ("exact_match", "f1", "cover_match", "format")
"""Answer scores, each 0 to 1."""

Outcome = Literal[
    "right_seen", "right_unseen", "reading_failed", "search_failed", "no_search", "no_answer", "failed"
]  # fmt: skip
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""Outcome of an episode.

``right_seen``: right, and a retrieved passage contains a golden answer; ``right_unseen``: right otherwise;
``reading_failed``: wrong although a golden answer was retrieved; ``search_failed``: wrong, and no search retrieved one;
``no_search``: wrong without a valid search (always so for method ``direct``); ``no_answer``: no parseable answer;
``failed``: a service failed.
"""

SCORE_SCHEMA = pl.Schema(
    {
        "system": pl.String,  # label
        "step": pl.Int64,  # optimiser step of the weights; null if none
        "suite": pl.String,
        "question_id": pl.String,  # unique within its suite
        "question": pl.String,
        "golden_answers": pl.List(pl.String),
        "sample": pl.Int64,  # index among the question's episodes, from 0
        "failed": pl.Boolean,  # because of a service, not the model
        "stop_reason": pl.String,
        "answer": pl.String,
        "exact_match": pl.Float64,  # scores are null if failed
        "f1": pl.Float64,
        "cover_match": pl.Float64,
        "format": pl.Float64,
        "turns": pl.Int64,
        "searches": pl.Int64,  # executed queries; passages given with the question count as one
        "calls": pl.Int64,  # tool calls, including malformed ones
        "malformed_calls": pl.Int64,
        "prompt_tokens": pl.Int64,  # full prompts, summed over turns
        "cached_prompt_tokens": pl.Int64,  # of these, billed as cache hits
        "sampled_tokens": pl.Int64,
        "seconds": pl.Float64,  # duration of the episode
        "sampling_seconds": pl.Float64,  # of these, waiting for the sampler
        "search_seconds": pl.Float64,  # of these, waiting for the search
        "answer_in_passage": pl.Boolean,  # a shown passage contains a golden answer
        "gold_recall": pl.Float64,  # share of metadata["gold_passages"] shown; null without any
        "outcome": pl.String,  # one of OUTCOMES
        "hop": pl.Int64,  # metadata["hop"]; null without
        "judged": pl.Float64,  # the judge's verdict; null if none
    }
)

RIGHT = 0.5
"""Threshold of exact match for outcomes and pass@k; custom rewards may give fractions."""


def score_frame(system: str, episodes: Iterable[tuple[int, Episode]], step: int | None = None) -> pl.DataFrame:
    """Scores of a system's episodes, with schema :data:`SCORE_SCHEMA`.

    Scores are the reward parts ``correct``, ``f1``, ``cover`` and ``format``; missing or non-finite parts are computed from
    the answer. ``episodes`` are (sample number, episode) pairs, failed ones included.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCORE_SCHEMA}
    label = storable(system)
    for sample, episode in episodes:
        for name, value in (_identity(episode) | _scores(episode) | _costs(episode)).items():
            columns[name].append(value)
        columns["sample"].append(sample)
        columns["system"].append(label)
        columns["step"].append(step)
        columns["judged"].append(None)
    return pl.DataFrame(
        {name: pl.Series(name, columns[name], dtype=dtype, strict=False) for name, dtype in SCORE_SCHEMA.items()}
    )


def _identity(episode: Episode) -> dict[str, Any]:
    question = episode.question
    return {
        "suite": storable(question.data_source),
        "question_id": storable(question.id),
        "question": storable(question.question),
        "golden_answers": [storable(answer) for answer in question.golden_answers],
        "hop": _whole_number(question.metadata.get("hop")),
        "failed": episode.failed,
        "stop_reason": episode.stop_reason.value,
        "answer": None if episode.answer is None else storable(episode.answer),
    }


def _scores(episode: Episode) -> dict[str, Any]:
    seen = answer_in_passage(episode)
    out: dict[str, Any] = {"answer_in_passage": seen, "gold_recall": _gold_recall(episode)}
    if episode.failed:
        return out | dict.fromkeys(METRICS) | {"outcome": "failed"}
    parts, answer, golden = episode.reward_parts, episode.answer, episode.question.golden_answers
    scores = {
        "exact_match": _part(parts, "correct", lambda: exact_match(answer, golden)),
        "f1": _part(parts, "f1", lambda: f1_score(answer, golden)),
        "cover_match": _part(parts, "cover", lambda: cover_match(answer, golden)),
        "format": _part(parts, "format", lambda: float(answer is not None)),
    }
    return out | scores | {"outcome": _outcome(episode, scores, seen)}


def _outcome(episode: Episode, scores: Mapping[str, float], seen: bool) -> Outcome:
    if scores["exact_match"] >= RIGHT:
        return "right_seen" if seen else "right_unseen"
    # Strict scoring may reject an answer that the episode parsed: its format part says so.
    if episode.answer is None or scores["format"] <= 0:
        return "no_answer"
    if seen:
        return "reading_failed"
    searched = episode.given is not None or any(call.problem is None for call in episode.calls)
    return "search_failed" if searched else "no_search"


def _costs(episode: Episode) -> dict[str, Any]:
    calls, given = episode.calls, episode.given
    used = sampling_usage(episode)
    return {
        "turns": len(episode.turns),
        "searches": sum(len(call.results) for call in calls) + (given is not None),
        "calls": len(calls),
        "malformed_calls": sum(call.problem is not None for call in calls),
        "prompt_tokens": used.prompt,
        "cached_prompt_tokens": used.cached,
        "sampled_tokens": used.sampled,
        "seconds": float(episode.seconds),
        "sampling_seconds": float(sum(turn.seconds for turn in episode.turns)),
        "search_seconds": float(sum(call.seconds for call in calls) + (given.seconds if given is not None else 0.0)),
    }


def _gold_recall(episode: Episode) -> float | None:
    wanted = episode.question.metadata.get("gold_passages")
    if isinstance(wanted, str | int):
        wanted = (wanted,)
    gold = {str(name) for name in wanted} if isinstance(wanted, list | tuple | set | frozenset) else set()
    if not gold:
        return None
    return len(gold & {passage.id for passage in passages_shown(episode)}) / len(gold)


def _part(parts: Mapping[str, float], name: str, computed: Any) -> float:
    value = parts.get(name)
    return float(value) if value is not None and math.isfinite(value) else computed()


def _whole_number(value: object) -> int | None:
    """Parses ``hop`` as found in files: 2, 2.0 or "2"; None for anything else."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else None

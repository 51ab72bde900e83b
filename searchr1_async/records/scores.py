"""Scores of an evaluation: one row per episode, the metrics aggregated from them, and comparisons by question. Pure.

Scores are small enough to keep in memory for full suites; the episodes stay on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from searchr1_async.billing import sampling_usage
from searchr1_async.episodes.rewards import cover_match, exact_match, f1
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.metrics import answer_in_passage, passages_shown
from searchr1_async.records.statistics import Estimate, Floats, PairedDifference, difference_of, mean_interval

SCORES = ("exact_match", "f1", "cover_match", "format")
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
        "step": pl.Int64,  # optimizer step of the weights; null if none
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
    """:func:`score_row` of a system's episodes, (sample number, episode) pairs, with schema :data:`SCORE_SCHEMA`."""
    rows = [score_row(system, sample, episode, step) for sample, episode in episodes]
    return pl.DataFrame(rows, schema=SCORE_SCHEMA, strict=False)


def score_row(system: str, sample: int, episode: Episode, step: int | None) -> dict[str, Any]:
    """The scores of an episode: reward parts ``correct``, ``f1``, ``cover`` and ``format``; missing or non-finite parts are
    computed from the answer."""
    question, calls, given, used = episode.question, episode.calls, episode.given, sampling_usage(episode)
    seen = answer_in_passage(episode)
    scores: dict[str, Any] = dict.fromkeys(SCORES) if episode.failed else _scores(episode)
    return {
        "system": storable(system),
        "step": step,
        "suite": storable(question.data_source),
        "question_id": storable(question.id),
        "question": storable(question.question),
        "golden_answers": [storable(answer) for answer in question.golden_answers],
        "sample": sample,
        "failed": episode.failed,
        "stop_reason": episode.stop_reason.value,
        "answer": None if episode.answer is None else storable(episode.answer),
        **scores,
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
        "answer_in_passage": seen,
        "gold_recall": _gold_recall(episode),
        "outcome": _outcome(episode, scores, seen),
        "hop": _whole_number(question.metadata.get("hop")),
        "judged": None,
    }


def _scores(episode: Episode) -> dict[str, Any]:
    answer, golden = episode.answer, episode.question.golden_answers
    computed: dict[str, tuple[str, Callable[[], float]]] = {
        "exact_match": ("correct", lambda: exact_match(answer, golden)),
        "f1": ("f1", lambda: f1(answer, golden)),
        "cover_match": ("cover", lambda: cover_match(answer, golden)),
        "format": ("format", lambda: float(answer is not None)),
    }
    parts = {name: value for name, value in episode.reward_parts.items() if value is not None and math.isfinite(value)}
    return {name: float(parts[part]) if part in parts else compute() for name, (part, compute) in computed.items()}


def _outcome(episode: Episode, scores: Mapping[str, Any], seen: bool) -> Outcome:
    if episode.failed:
        return "failed"
    if scores["exact_match"] >= RIGHT:
        return "right_seen" if seen else "right_unseen"
    # Strict scoring may reject an answer that the episode parsed: its format part says so.
    if episode.answer is None or scores["format"] <= 0:
        return "no_answer"
    if seen:
        return "reading_failed"
    searched = episode.given is not None or any(call.problem is None for call in episode.calls)
    return "search_failed" if searched else "no_search"


def _gold_recall(episode: Episode) -> float | None:
    wanted = episode.question.metadata.get("gold_passages")
    if isinstance(wanted, str | int):
        wanted = (wanted,)
    gold = {str(name) for name in wanted} if isinstance(wanted, list | tuple | set | frozenset) else set()
    if not gold:
        return None
    return len(gold & {passage.id for passage in passages_shown(episode)}) / len(gold)


def _whole_number(value: object) -> int | None:
    """Parses ``hop`` as found in files: 2, 2.0 or "2"; None for anything else."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else None


COSTS = (
    *("turns", "searches", "prompt_tokens", "cached_prompt_tokens", "sampled_tokens"),
    *("seconds", "sampling_seconds", "search_seconds"),
)
"""Cost columns; seconds are durations of single episodes that ran concurrently with others."""
SUITE_COSTS = pl.Schema(
    {
        "suite": pl.String,
        "questions": pl.Int64,
        "episodes": pl.Int64,
        **dict.fromkeys(COSTS, pl.Float64),  # per question over all its samples, averaged
        "seconds_p95": pl.Float64,  # per episode
    }
)
FIGURES = (*SCORES, "judged", "answer_in_passage", "gold_recall", "calls", "malformed_calls", *COSTS)
"""Columns of a scores frame that can be averaged."""
QUESTION = ("suite", "question_id")
"""Key of a question: ids are unique only within a suite."""
ALL_SUITES, MACRO = "all", "macro"


def question_means(scores: pl.DataFrame) -> pl.DataFrame:
    """One row per question in order of appearance: ``suite``, ``question_id``, ``question``, ``golden_answers``, ``hop``,
    ``samples``, ``finished``, ``right`` (of the finished ones), and the mean of each of :data:`FIGURES` over finished samples
    (null without any)."""
    finished = ~pl.col("failed")
    return scores.group_by(*QUESTION, maintain_order=True).agg(
        pl.col("question", "golden_answers", "hop").first(),
        samples=pl.len().cast(pl.Int64),
        finished=finished.sum().cast(pl.Int64),
        right=(pl.col("exact_match") >= RIGHT).sum().cast(pl.Int64),
        **{name: pl.col(name).cast(pl.Float64).filter(finished).mean() for name in FIGURES},
    )


def outcome_frame(scores: pl.DataFrame) -> pl.DataFrame:
    """``suite``, ``outcome``, ``episodes`` and ``share`` (of finished episodes; null for ``failed``, NaN without any) for each
    suite, and for ``all`` if there are several."""
    each = _pooled(scores)
    grid = each.select("suite").unique(maintain_order=True).join(pl.DataFrame({"outcome": OUTCOMES}), how="cross")
    counts = each.group_by("suite", "outcome").agg(episodes=pl.len().cast(pl.Int64))
    finished, episodes = pl.col("outcome") != "failed", pl.col("episodes")
    counted = grid.join(counts, on=["suite", "outcome"], how="left", maintain_order="left").fill_null(0)
    return counted.with_columns(share=pl.when(finished).then(episodes / episodes.filter(finished).sum().over("suite")))


def cost_frame(scores: pl.DataFrame) -> pl.DataFrame:
    """Costs of finished episodes, one row per suite, and ``all`` if there are several: :data:`SUITE_COSTS`."""
    each = _pooled(scores.filter(~pl.col("failed")))
    asked = each.group_by("suite", "key", maintain_order=True).agg(pl.col(COSTS).sum(), episodes=pl.len())
    means = asked.group_by("suite", maintain_order=True).agg(
        pl.len().alias("questions"), pl.col("episodes").sum(), pl.col(COSTS).mean()
    )
    slowest = each.group_by("suite").agg(seconds_p95=pl.col("seconds").quantile(0.95, "linear"))
    return means.join(slowest, on="suite", maintain_order="left").cast(dict(SUITE_COSTS))  # type: ignore[arg-type]


def suites_of(scores: pl.DataFrame) -> tuple[str, ...]:
    """Suites in order of appearance."""
    return tuple(scores["suite"].unique(maintain_order=True).to_list())


def _pooled(scores: pl.DataFrame) -> pl.DataFrame:
    """The rows of each suite, again as those of ``all`` if there are several, with the question in ``key``."""
    own = scores.with_columns(key=pl.struct(QUESTION))
    is_pooled = own["suite"].n_unique() > 1 and ALL_SUITES not in own["suite"]
    return pl.concat([own, own.with_columns(suite=pl.lit(ALL_SUITES))]) if is_pooled else own


def check_metric(metric: str) -> None:
    """Raises :class:`ConfigurationError` for an unknown metric."""
    if metric not in FIGURES:
        raise ConfigurationError(f"there is no metric {metric!r}: choose one of {', '.join(FIGURES)}")


def check_suite(suite: str, suites: Sequence[str], label: str) -> None:
    """Raises :class:`ConfigurationError` for an unknown suite."""
    if suite not in suites:
        raise ConfigurationError(f"{label!r} has no suite {suite!r}: it has {', '.join(map(repr, suites)) or 'none'}")


def by_suite(values: pl.DataFrame, suites: Sequence[str]) -> dict[str, Floats]:
    """Per suite, the non-null values of its questions."""
    kept = values.drop_nulls("value").group_by("suite", maintain_order=True).agg("value")
    found = dict(kept.iter_rows())
    return {suite: np.asarray(found.get(suite, ()), dtype=np.float64) for suite in suites}


def estimate_of(values: Mapping[str, Floats], suite: str | None, label: str) -> Estimate:
    """Mean over the questions of a suite, of ``all`` (or None), or over suites (``macro``).

    A suite that has one of these names takes precedence. Raises :class:`ConfigurationError` for an unknown suite.
    """
    if suite is None or (suite == ALL_SUITES and suite not in values):
        parts = [np.concatenate([np.empty(0), *values.values()])]
    elif suite == MACRO and suite not in values:
        parts = list(values.values())
    else:
        check_suite(suite, tuple(values), label)
        parts = [values[suite]]
    means = [float(own.mean()) for own in parts if own.size]
    return Estimate(sum(means) / len(means) if means else math.nan, *mean_interval(*parts))


FLIP_SCHEMA = pl.Schema(
    {
        "suite": pl.String,
        "question_id": pl.String,
        "question": pl.String,
        "golden_answers": pl.List(pl.String),
        "direction": pl.String,  # "improved" or "worsened"
        "before": pl.Float64,  # mean over samples
        "after": pl.Float64,
        "difference": pl.Float64,
        "before_answer": pl.String,
        "after_answer": pl.String,
        "before_sample": pl.Int64,  # sample number of the answer
        "after_sample": pl.Int64,
    }
)


def paired_questions(before: pl.DataFrame, after: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Questions with a score on both sides, in the order of ``before``: ``suite``, ``question_id``, ``before``, ``after``,
    ``difference``, ``is_single`` (one 0/1 sample on both sides)."""
    columns = [*QUESTION, "finished", pl.col(metric).alias("score")]
    pairs = before.select(columns).join(
        after.select(columns), on=list(QUESTION), suffix="_after", maintain_order="left"
    )
    is_binary = [pl.col(name).is_in([0.0, 1.0]) for name in ("score", "score_after")]
    return pairs.drop_nulls(["score", "score_after"]).select(
        *QUESTION,
        before="score",
        after="score_after",
        difference=pl.col("score_after") - pl.col("score"),
        is_single=(pl.col("finished") == 1) & (pl.col("finished_after") == 1) & is_binary[0] & is_binary[1],
    )


def difference_of_pairs(pairs: pl.DataFrame, *, is_macro: bool, seed: int = 0) -> PairedDifference:
    """The difference over :func:`paired_questions`, at least one: all questions count equally, or all suites if ``is_macro``."""
    parts = [own for _, own in pairs.group_by("suite", maintain_order=True)] if is_macro else [pairs]
    differences = [own["difference"].to_numpy() for own in parts]
    return difference_of(*differences, is_single=not is_macro and bool(pairs["is_single"].all()), seed=seed)


def flip_frame(pairs: pl.DataFrame, before: pl.DataFrame, after: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Questions whose score changed, with schema :data:`FLIP_SCHEMA`: largest change first, then by suite and id.

    ``pairs`` come from :func:`paired_questions`, ``before`` and ``after`` are scores frames.
    """
    texts = before.unique(QUESTION, keep="first").select(*QUESTION, "question", "golden_answers")
    changed = pairs.filter(pl.col("difference").abs() > 1e-9).join(texts, on=QUESTION, how="left")
    parts = []
    for direction, is_gain in (("improved", True), ("worsened", False)):
        own = changed.filter((pl.col("difference") > 0) == is_gain).with_columns(direction=pl.lit(direction))
        own = own.join(_extreme_sample(before, metric, "before", best=not is_gain), on=QUESTION, how="left")
        parts.append(own.join(_extreme_sample(after, metric, "after", best=is_gain), on=QUESTION, how="left"))
    order = [pl.col("difference").abs().round(9), *QUESTION]
    return pl.concat(parts).sort(order, descending=[True, False, False]).select(FLIP_SCHEMA.names()).cast(FLIP_SCHEMA)  # type: ignore[arg-type]


def _extreme_sample(scores: pl.DataFrame, metric: str, side: str, *, best: bool) -> pl.DataFrame:
    """Per question, its first best (or worst) sample."""
    ordered = scores.drop_nulls(metric).sort(metric, "sample", descending=[best, False], maintain_order=True)
    first = ordered.unique(QUESTION, keep="first", maintain_order=True)
    return first.select(*QUESTION, pl.col("answer").alias(f"{side}_answer"), pl.col("sample").alias(f"{side}_sample"))

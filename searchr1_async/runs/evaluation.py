"""The result of one evaluation: per-episode scores and the metrics computed from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl

from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError
from searchr1_async.records import scores as comparison
from searchr1_async.records.scores import (
    ALL_SUITES,
    MACRO,
    QUESTION,
    SCORES,
    by_suite,
    check_metric,
    check_suite,
    cost_frame,
    estimate_of,
    outcome_frame,
    question_means,
    score_frame,
    suites_of,
)
from searchr1_async.records.statistics import Estimate, Floats, Interval, PairedDifference, pass_at_k


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """The scores of one evaluation. Several episodes of one question are its samples.

    Each metric is averaged over a question's samples, then over questions. Failed episodes are excluded from everything
    but ``failed`` and ``outcomes``. Metrics without data are NaN.
    """

    label: str
    """Name of what was evaluated: ``untrained``, ``after RL``."""
    scores: pl.DataFrame
    """One row per episode: at least the columns of :data:`searchr1_async.records.scores.SCORE_SCHEMA`."""
    step: int | None = None
    """Optimizer step of the weights; None when not tied to a step."""
    load: Callable[[], Sequence[Episode]] | None = field(default=None)
    """Loads the episodes; None if they were not kept."""

    @staticmethod
    def of(label: str, episodes: Iterable[Episode], step: int | None = None) -> Evaluation:
        """Builds an evaluation from episodes in memory; samples of a question are numbered in input order."""
        kept, samples = tuple(episodes), []
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for episode in kept:
            key = episode.question.data_source, episode.question.id
            samples.append(seen[key])
            seen[key] += 1
        return Evaluation(label, score_frame(label, zip(samples, kept, strict=True), step), step, lambda: kept)

    def __repr__(self) -> str:
        low, high = self.exact_match_interval
        return (
            f"Evaluation({self.label!r}, questions={self.questions}, exact_match={self.exact_match:.3f} "
            f"[{low:.3f}, {high:.3f}], failed={self.failed})"
        )

    def __str__(self) -> str:
        """``exact match 25.0% [18.1, 33.4] on 120 questions``, with the number of failed episodes if there are any."""
        low, high = (100 * end for end in self.exact_match_interval)
        failed = f", {self.failed} failed" if self.failed else ""
        return f"exact match {self.exact_match:.1%} [{low:.1f}, {high:.1f}] on {self.questions} questions{failed}"

    @cached_property
    def by_question(self) -> pl.DataFrame:
        """One row per question: :func:`searchr1_async.records.scores.question_means`."""
        return question_means(self.scores)

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """Suite names in question order."""
        return suites_of(self.scores)

    @property
    def questions(self) -> int:
        """Number of distinct questions, failed ones included."""
        return self.by_question.height

    @property
    def samples_per_question(self) -> int:
        """Maximum number of samples of any question; 0 without questions."""
        return max(self.by_question["samples"], default=0)

    @cached_property
    def failed(self) -> int:
        """Number of episodes that failed because of a service."""
        return int(self.scores["failed"].sum())

    def estimate(self, metric: str, suite: str | None = None) -> Estimate:
        """Mean of a metric over questions, with its 95 % interval (:func:`.statistics.mean_intervals`).

        Args:
            metric: ``exact_match``, ``f1``, ``cover_match``, ``format``, or another numeric column of ``scores``
                (``judged``, ``answer_in_passage``, ``gold_recall``, ``turns``, ``searches``, ``prompt_tokens``, …).
            suite: a suite's name; None pools all questions, ``"macro"`` is the unweighted mean over suites.

        Raises:
            ConfigurationError: unknown metric or suite.
        """
        return estimate_of(self.values_of(metric), suite, self.label)

    def pass_at(self, k: int, suite: str | None = None) -> Estimate:
        """Unbiased pass@k averaged over questions (:func:`.statistics.pass_at_k`).

        Questions with fewer than k finished samples are excluded. ``suite`` is as in :meth:`estimate`.

        Raises:
            ConfigurationError: k is below 1 or above ``samples_per_question``, or the suite is unknown.
        """
        self._check_samples(k)
        enough = self.by_question.filter(pl.col("finished") >= k)
        values = enough.select("suite", value=pl.Series(pass_at_k(enough["finished"], enough["right"], k)))
        return estimate_of(by_suite(values, self.suites), suite, self.label)

    def avg_at(self, k: int, suite: str | None = None) -> Estimate:
        """avg@k: exact match over the first k samples of each question; arguments and errors as :meth:`pass_at`."""
        self._check_samples(k)
        first = self.scores.filter(~pl.col("failed")).sort("sample", maintain_order=True)
        means = first.group_by(*QUESTION, maintain_order=True).agg(
            pl.col("exact_match").head(k).mean().alias("value"), finished=pl.len()
        )
        values = means.filter(pl.col("finished") >= k).select("suite", "value")
        return estimate_of(by_suite(values, self.suites), suite, self.label)

    def values_of(self, metric: str) -> dict[str, Floats]:
        """Per suite, the per-question means behind an estimate; questions without a value are excluded."""
        check_metric(metric)
        return by_suite(self.by_question.select("suite", value=metric), self.suites)

    def summary(self) -> pl.DataFrame:
        """Columns ``suite``, ``metric``, ``mean``, ``low``, ``high`` (95 %), ``questions`` and ``episodes`` (scored ones).

        One row per suite and score, plus ``judged`` if a judge ran. With several suites, adds rows for ``all`` (pooled
        questions) and ``macro`` (unweighted mean over suites).
        """
        metrics = [*SCORES, *(["judged"] if self.scores["judged"].is_not_null().any() else [])]
        values = {metric: self.values_of(metric) for metric in metrics}
        over = [ALL_SUITES, MACRO] if len(self.suites) > 1 else []
        rows = []
        for name in [*self.suites, *over]:
            own = self._finished_scores if name in over else self._finished_scores.filter(suite=name)
            for metric in metrics:
                questions = sum(map(len, values[metric].values())) if name in over else len(values[metric][name])
                estimate = estimate_of(values[metric], name, self.label)
                rows.append((name, metric, *estimate, questions, own[metric].count()))
        schema = {"suite": pl.String, "metric": pl.String, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
        return pl.DataFrame(rows, schema=schema | {"questions": pl.Int64, "episodes": pl.Int64}, orient="row")

    @cached_property
    def exact_match(self) -> float:
        """Share of answers that equal a golden answer after normalisation (reward part ``correct``)."""
        return self.estimate("exact_match").mean

    @cached_property
    def exact_match_interval(self) -> Interval:
        """95 % Wilson interval over questions, using the effective number of questions if there are several samples."""
        return Interval(*self.estimate("exact_match")[1:])

    @cached_property
    def f1(self) -> float:
        """Mean token F1 against the best-matching golden answer."""
        return self.estimate("f1").mean

    def outcomes(self) -> pl.DataFrame:
        """Outcome counts and shares: :func:`searchr1_async.records.scores.outcome_frame`."""
        return outcome_frame(self.scores)

    def costs(self) -> pl.DataFrame:
        """Turns, searches, tokens and seconds: :func:`searchr1_async.records.scores.cost_frame`."""
        return cost_frame(self.scores)

    @cached_property
    def turns_per_episode(self) -> float:
        return self._mean_of_episodes("turns")

    @cached_property
    def valid_call_fraction(self) -> float:
        """Share of well-formed tool calls; NaN if the model made none."""
        calls, malformed = self._finished_scores.select(pl.col("calls", "malformed_calls").sum()).row(0)
        return 1 - malformed / calls if calls else math.nan

    @cached_property
    def answer_in_passage(self) -> float:
        """Share of episodes in which a passage shown to the model contains a golden answer."""
        return self._mean_of_episodes("answer_in_passage")

    def metrics(self) -> dict[str, float]:
        """Metrics for events: exact match with its interval and per suite, and counts."""
        low, high = self.exact_match_interval
        return {
            "exact_match": self.exact_match,
            "exact_match_low": low,
            "exact_match_high": high,
            "questions": float(self.questions),
            "episodes": float(self.scores.height),
            "turns_per_episode": self.turns_per_episode,
            **{f"exact_match/{suite}": self.estimate("exact_match", suite).mean for suite in sorted(self.suites)},
        }

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The episodes; an evaluation with a folder reads them from disk on each access.

        Raises:
            ConfigurationError: the episodes were not kept.
        """
        if self.load is None:
            raise ConfigurationError(
                f"the episodes of {self.label!r} were not kept, only their scores: pass out_dir to evaluate() to keep them"
            )
        return tuple(self.load())

    @cached_property
    def _finished_scores(self) -> pl.DataFrame:
        return self.scores.filter(~pl.col("failed"))

    def _mean_of_episodes(self, column: str) -> float:
        mean = self._finished_scores[column].cast(pl.Float64).mean()
        return math.nan if mean is None else float(mean)  # type: ignore[arg-type]

    def _check_samples(self, k: int) -> None:
        if not 1 <= k <= max(self.samples_per_question, 1):
            raise ConfigurationError(
                f"k is {k}, but {self.label!r} has {self.samples_per_question} samples per question: "
                "evaluate with samples=k or more"
            )


def compare(
    before: Evaluation, after: Evaluation, metric: str = "exact_match", *, suite: str | None = None, seed: int = 0
) -> PairedDifference:
    """Difference ``after - before``, paired by question (:func:`.statistics.difference_of`).

    Questions whose episodes all failed on one side are excluded. The order of questions may differ.

    Args:
        metric, suite: as in :meth:`Evaluation.estimate`.
        seed: seed of sampled sign flips.

    Raises:
        ConfigurationError: the evaluations have different questions or no finished question in common, or the metric or
            suite is unknown.
    """
    pairs = _pairs(before, after, metric, suite)
    is_macro = suite == MACRO and MACRO not in before.suites
    return comparison.difference_of_pairs(pairs, is_macro=is_macro, seed=seed)


def flips(
    before: Evaluation, after: Evaluation, metric: str = "exact_match", *, suite: str | None = None
) -> pl.DataFrame:
    """Questions whose score changed, largest change first: :data:`searchr1_async.records.scores.FLIP_SCHEMA`.

    ``before`` and ``after`` are means over samples. ``before_answer`` and ``after_answer`` come from the samples that show
    the change: for an improved question, a worst sample before and a best one after.

    Args and errors as :func:`compare`.
    """
    return comparison.flip_frame(_pairs(before, after, metric, suite), before.scores, after.scores, metric)


def _pairs(before: Evaluation, after: Evaluation, metric: str, suite: str | None) -> pl.DataFrame:
    check_metric(metric)
    questions_before, questions_after = before.by_question, after.by_question
    if suite is not None and suite not in (ALL_SUITES, MACRO):
        for evaluation in (before, after):
            check_suite(suite, evaluation.suites, evaluation.label)
        questions_before, questions_after = (
            questions.filter(pl.col("suite") == suite) for questions in (questions_before, questions_after)
        )
    only_before = questions_before.join(questions_after, on=list(QUESTION), how="anti").height
    only_after = questions_after.join(questions_before, on=list(QUESTION), how="anti").height
    if only_before or only_after:
        raise ConfigurationError(
            f"{before.label!r} and {after.label!r} cannot be compared: {only_before} questions are "
            f"only in the first and {only_after} only in the second; evaluate both on the same suite"
        )
    pairs = comparison.paired_questions(questions_before, questions_after, metric)
    if not pairs.height:
        raise ConfigurationError(f"{before.label!r} and {after.label!r} have no finished question in common")
    return pairs

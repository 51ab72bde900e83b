"""What an evaluation found: the scores of its episodes, and the figures that are read from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.episodes.types import Episode, StopReason
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation import comparison
from searchr1_async.evaluation.figures import (
    ALL_SUITES,
    MACRO,
    QUESTION,
    by_suite,
    check_metric,
    check_suite,
    cost_frame,
    estimate_of,
    outcome_frame,
    question_means,
    suites_of,
)
from searchr1_async.evaluation.scores import METRICS, score_frame
from searchr1_async.evaluation.statistics import (
    Estimate,
    Floats,
    Interval,
    PairedDifference,
    pass_at_k,
)
from searchr1_async.watch.curve import EvaluationPoint
from searchr1_async.watch.rows import episodes_frame, evaluation_rows
from searchr1_async.watch.viewer import CellView, page_of


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """The scores of one evaluation. Several episodes of one question are samples of it.

    Scores are means over questions of the mean over each question's samples, so that a question counts once however
    often it was sampled. Failed episodes say nothing about the model: they are left out of every figure but ``failed``
    and ``stop_fractions``. Figures of nothing are NaN.
    """

    label: str
    """What was evaluated: ``untrained``, ``after RL``."""
    scores: pl.DataFrame
    """One row for each episode: :data:`searchr1_async.evaluation.scores.SCORE_SCHEMA`, and any columns besides."""
    step: int | None = None
    """Optimiser steps done before it; None when it belongs to no step."""
    load: Callable[[], Sequence[Episode]] | None = field(default=None)
    """Reads the episodes themselves; None where they were not kept."""

    @staticmethod
    def of(label: str, episodes: Iterable[Episode], step: int | None = None) -> Evaluation:
        """The evaluation of episodes in memory; the samples of a question are numbered in their order."""
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

    # --- what was asked -----------------------------------------------------------------------------------------------

    @cached_property
    def by_question(self) -> pl.DataFrame:
        """One row for each question: :func:`searchr1_async.evaluation.figures.question_means`."""
        return question_means(self.scores)

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """In the order in which they were asked."""
        return suites_of(self.scores)

    @property
    def questions(self) -> int:
        """Different questions asked, failed ones too."""
        return self.by_question.height

    @property
    def samples_per_question(self) -> int:
        """Episodes of the question that has most of them; 0 of nothing."""
        return max(self.by_question["samples"], default=0)

    @cached_property
    def failed(self) -> int:
        """Episodes that a service ended."""
        return int(self.scores["failed"].sum())

    # --- scores -------------------------------------------------------------------------------------------------------

    def estimate(self, metric: str, suite: str | None = None) -> Estimate:
        """A figure's mean over questions, with its 95 % interval (:func:`.statistics.mean_intervals`).

        Args:
            metric: one of ``exact_match``, ``f1``, ``cover_match``, ``format``, or another column of ``scores`` that has a mean
                (``judged``, ``answer_in_passage``, ``gold_recall``, ``turns``, ``searches``, ``prompt_tokens``, …).
            suite: its name; None is all questions alike, ``"macro"`` the unweighted mean over suites.

        Raises:
            ConfigurationError: no such figure or suite.
        """
        return estimate_of(self.values_of(metric), suite, self.label)

    def pass_at(self, k: int, suite: str | None = None) -> Estimate:
        """The chance that one of k samples is right: pass@k, unbiased (:func:`.statistics.pass_at_k`), over questions.

        Questions of which fewer than k samples finished are left out.

        Args:
            k: samples allowed.
            suite: as in :meth:`estimate`.

        Raises:
            ConfigurationError: k is below 1 or above ``samples_per_question``, or no such suite.
        """
        self._check_samples(k)
        enough = self.by_question.filter(pl.col("finished") >= k)
        values = enough.select("suite", value=pl.Series(pass_at_k(enough["finished"], enough["right"], k)))
        return estimate_of(by_suite(values, self.suites), suite, self.label)

    def avg_at(self, k: int, suite: str | None = None) -> Estimate:
        """Exact match averaged over the first k samples of each question: avg@k; arguments and errors as in :meth:`pass_at`."""
        self._check_samples(k)
        first = self.scores.filter(~pl.col("failed")).sort("sample", maintain_order=True)
        means = first.group_by(*QUESTION, maintain_order=True).agg(
            pl.col("exact_match").head(k).mean().alias("value"), finished=pl.len()
        )
        values = means.filter(pl.col("finished") >= k).select("suite", "value")
        return estimate_of(by_suite(values, self.suites), suite, self.label)

    @property
    def avg_at_k(self) -> Estimate:
        """Exact match averaged over all samples of each question."""
        return self.estimate("exact_match")

    def values_of(self, metric: str) -> dict[str, Floats]:
        """What an estimate is made from: by suite each question's mean, of those that have one."""
        check_metric(metric)
        return by_suite(self.by_question.select("suite", value=metric), self.suites)

    def summary(self) -> pl.DataFrame:
        """Columns ``suite``, ``metric``, ``mean``, ``low``, ``high`` (95 %), ``questions`` and ``episodes`` (with a score).

        A row for each suite and each of the four scores, and ``judged`` where a judge was asked; with several suites also those of
        ``all`` questions alike and of ``macro``, the unweighted mean over suites.
        """
        metrics = [*METRICS, *(["judged"] if self.scores["judged"].is_not_null().any() else [])]
        over = [ALL_SUITES, MACRO] if len(self.suites) > 1 else []
        rows = []
        for metric in metrics:
            values = self.values_of(metric)
            scored = self.scores.filter(pl.col(metric).is_not_null() & ~pl.col("failed"))
            counts = {str(suite): count for suite, count in scored.group_by("suite").len().iter_rows()}
            for suite in self.suites:
                rows.append(
                    (suite, metric, *estimate_of(values, suite, self.label), len(values[suite]), counts.get(suite, 0))
                )
            for name in over:
                rows.append(
                    (
                        name,
                        metric,
                        *estimate_of(values, name, self.label),
                        sum(map(len, values.values())),
                        scored.height,
                    )
                )
        schema = {"suite": pl.String, "metric": pl.String, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
        frame = pl.DataFrame(rows, schema=schema | {"questions": pl.Int64, "episodes": pl.Int64}, orient="row")
        places = {name: place for place, name in enumerate([*self.suites, *over])}
        return frame.sort(pl.col("suite").replace_strict(places, return_dtype=pl.Int64), maintain_order=True)

    @cached_property
    def exact_match(self) -> float:
        """Share of answers that are exactly a golden one after normalisation (reward part ``correct``)."""
        return self.estimate("exact_match").mean

    @cached_property
    def exact_match_interval(self) -> Interval:
        """95 %, over questions: Wilson's, with the effective number of questions where they have several samples."""
        return Interval(*self.estimate("exact_match")[1:])

    @cached_property
    def f1(self) -> float:
        """Mean token F1 against the best golden answer."""
        return self.estimate("f1").mean

    @cached_property
    def cover_match(self) -> float:
        """Share of answers that hold a golden one as whole words."""
        return self.estimate("cover_match").mean

    @cached_property
    def format(self) -> float:
        """Share of episodes of which an answer could be read."""
        return self.estimate("format").mean

    @property
    def macro(self) -> Estimate:
        """Exact match, the unweighted mean over suites."""
        return self.estimate("exact_match", MACRO)

    # --- how it was done ----------------------------------------------------------------------------------------------

    def outcomes(self) -> pl.DataFrame:
        """Where it went wrong: :func:`searchr1_async.evaluation.figures.outcome_frame`."""
        return outcome_frame(self.scores)

    def costs(self) -> pl.DataFrame:
        """What it took: :func:`searchr1_async.evaluation.figures.cost_frame`."""
        return cost_frame(self.scores)

    @cached_property
    def turns_per_episode(self) -> float:
        return self._mean_of_episodes("turns")

    @cached_property
    def valid_call_fraction(self) -> float:
        """Share of tool calls that could be read; NaN when the model made none."""
        calls, malformed = self._finished_scores.select(pl.col("calls", "malformed_calls").sum()).row(0)
        return 1 - malformed / calls if calls else math.nan

    @cached_property
    def answer_in_passage(self) -> float:
        """Share of episodes in which a golden answer stood in a passage that the model was shown."""
        return self._mean_of_episodes("answer_in_passage")

    @cached_property
    def gold_recall(self) -> float:
        """Share of a question's ``gold_passages`` that an episode was shown; NaN where none are known."""
        return self._mean_of_episodes("gold_recall")

    @cached_property
    def stop_fractions(self) -> Mapping[str, float]:
        """``stop/<reason>`` as fractions of all episodes, failed ones too."""
        counts = dict(self.scores.group_by("stop_reason").len().iter_rows())
        return {
            f"stop/{reason.value}": counts.get(reason.value, 0) / max(self.scores.height, 1) for reason in StopReason
        }

    def metrics(self) -> dict[str, float]:
        """The figures to tell in an event: exact match with the ends of its interval, counts, and each suite's exact match."""
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

    def point(self) -> EvaluationPoint:
        """Where it stands in the learning curve."""
        return EvaluationPoint(self.label, self.step, self.exact_match, *self.exact_match_interval)

    # --- parts and episodes -------------------------------------------------------------------------------------------

    @property
    def by_data_source(self) -> dict[str, Evaluation]:
        """The same for each suite by itself, by name."""
        return self._split("suite", lambda episode: episode.question.data_source)

    @property
    def by_hop(self) -> dict[str, Evaluation]:
        """The same by ``question.metadata["hop"]``; questions without it are left out."""
        return self._split("hop", lambda episode: episode.question.metadata.get("hop"))

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The episodes themselves; those of a large evaluation are read from the disk each time.

        Raises:
            ConfigurationError: they were not kept.
        """
        if self.load is None:
            raise ConfigurationError(
                f"the episodes of {self.label!r} were not kept, only their scores: evaluate with an out_dir to keep them"
            )
        return tuple(self.load())

    @property
    def finished(self) -> tuple[Episode, ...]:
        """The episodes that no service ended; errors as of :attr:`episodes`."""
        return tuple(episode for episode in self.episodes if not episode.failed)

    def view(self, path: str | Path | None = None) -> Path | CellView:
        """Its episodes in the viewer: filter, sort, read.

        Args:
            path: writes one self-contained HTML page there and returns its path; None shows it in the notebook's cell.

        Raises:
            ConfigurationError: the episodes were not kept.
            OSError: ``path`` cannot be written.
        """
        target = None if path is None else absolute_path(path)
        page = page_of(self.episodes, title=f"Episodes of {self.label}", label=self.label, step=self.step)
        if target is None:
            return CellView(page)
        target.write_text(page, encoding="utf-8", newline="\n")
        return target

    def to_frame(self) -> pl.DataFrame:
        """One row for each episode, with the columns of :data:`searchr1_async.watch.rows.EPISODE_SCHEMA`.

        Raises:
            ConfigurationError: the episodes were not kept.
        """
        return episodes_frame(evaluation_rows(self.label, self.episodes, self.step))

    # --- inside -------------------------------------------------------------------------------------------------------

    @cached_property
    def _finished_scores(self) -> pl.DataFrame:
        return self.scores.filter(~pl.col("failed"))

    def _mean_of_episodes(self, column: str) -> float:
        mean = self._finished_scores[column].cast(pl.Float64).mean()
        return math.nan if mean is None else float(mean)  # type: ignore[arg-type]

    def _check_samples(self, k: int) -> None:
        if not 1 <= k <= max(self.samples_per_question, 1):
            raise ConfigurationError(
                f"k is {k}, but {self.label!r} has {self.samples_per_question} samples a question: "
                "evaluate with samples=k or more"
            )

    def _split(self, column: str, key: Callable[[Episode], object]) -> dict[str, Evaluation]:
        parts = {str(name): own for (name,), own in self.scores.group_by(column) if name is not None}
        return {name: Evaluation(name, parts[name], self.step, self._loading(key, name)) for name in sorted(parts)}

    def _loading(self, key: Callable[[Episode], object], name: str) -> Callable[[], Sequence[Episode]] | None:
        if self.load is None:
            return None
        return lambda: tuple(episode for episode in self.episodes if str(key(episode)) == name)


def compare(
    before: Evaluation, after: Evaluation, metric: str = "exact_match", *, suite: str | None = None, seed: int = 0
) -> PairedDifference:
    """How much better ``after`` is, paired by question (:func:`.statistics.paired_difference`).

    Questions of which every episode failed on one side are left out of both.

    Args:
        before: the earlier evaluation.
        after: the later one, of the same questions in any order.
        metric: what is compared; as in :meth:`Evaluation.estimate`.
        suite: its name; None is all questions alike, ``"macro"`` the unweighted mean over suites.
        seed: of the sign flips, where they are sampled.

    Raises:
        ConfigurationError: the two did not ask the same questions, or have no finished one in common; no such figure or suite.
    """
    pairs = _pairs(before, after, metric, suite)
    if suite == MACRO and MACRO not in before.suites:
        return comparison.macro_difference(pairs, seed)
    return comparison.pooled_difference(pairs, seed)


def flips(
    before: Evaluation, after: Evaluation, metric: str = "exact_match", *, suite: str | None = None
) -> pl.DataFrame:
    """The questions whose score changed, the greatest change first: :data:`searchr1_async.evaluation.comparison.FLIP_SCHEMA`.

    ``before_answer`` and ``after_answer`` are those of the first sample that shows the change (of an improved question one of the
    worst before and one of the best after), ``before`` and ``after`` the means over all its samples.

    Args and errors as of :func:`compare`.
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
            f"only in the first and {only_after} only in the second; evaluate both on one suite"
        )
    pairs = comparison.paired_questions(questions_before, questions_after, metric)
    if not pairs.height:
        raise ConfigurationError(f"{before.label!r} and {after.label!r} have no finished question in common")
    return pairs

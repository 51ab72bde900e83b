"""What an evaluation found: its episodes, and the figures that are read from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.statistics import (
    Interval,
    PairedDifference,
    cluster_bootstrap,
    paired_difference,
    wilson_interval,
)
from searchr1_async.watch.curve import EvaluationPoint
from searchr1_async.watch.metrics import answer_in_passage, stop_fractions
from searchr1_async.watch.rows import episodes_frame, evaluation_rows
from searchr1_async.watch.viewer import CellView, page_of

QuestionKey = tuple[str, str, str]
"""Suite, identifier and text: an identifier alone may be used by two suites."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The episodes of one evaluation. Several episodes of one question are samples of it.

    Scores are means over questions of the mean over each question's samples, so that a question counts once however
    often it was sampled. Failed episodes say nothing about the model: they are left out of every figure but ``failed``
    and ``stop_fractions``. Figures of nothing are NaN.
    """

    label: str
    """What was evaluated: ``untrained``, ``after RL``."""
    episodes: tuple[Episode, ...]
    step: int | None = None
    """Optimiser steps done before it; None when it belongs to no step."""

    def __repr__(self) -> str:
        low, high = self.exact_match_interval
        return (
            f"Evaluation({self.label!r}, questions={self.questions}, exact_match={self.exact_match:.3f} "
            f"[{low:.3f}, {high:.3f}], failed={self.failed})"
        )

    @cached_property
    def finished(self) -> tuple[Episode, ...]:
        return tuple(episode for episode in self.episodes if not episode.failed)

    @property
    def failed(self) -> int:
        """Episodes that a service ended."""
        return len(self.episodes) - len(self.finished)

    @cached_property
    def questions(self) -> int:
        """Different questions asked, failed ones too."""
        return len({question_key(episode) for episode in self.episodes})

    @cached_property
    def samples_per_question(self) -> int:
        """Episodes of the question that has most of them; 0 of nothing."""
        counts: dict[QuestionKey, int] = defaultdict(int)
        for episode in self.episodes:
            counts[question_key(episode)] += 1
        return max(counts.values(), default=0)

    @cached_property
    def exact_match(self) -> float:
        """Share of answers that are exactly a golden one after normalisation (reward part ``correct``)."""
        return _mean_of_questions(self._scores("correct"))

    @cached_property
    def exact_match_interval(self) -> Interval:
        """95 %: Wilson's for one sample a question, else a bootstrap over questions."""
        scores = self._scores("correct")
        means = [float(np.mean(samples)) for samples in scores.values()]
        interval = cluster_bootstrap(means, list(scores)) if self.samples_per_question > 1 else None
        # A bootstrap of equal values is a point: it would claim certainty from a handful of questions.
        if interval is None or interval.low == interval.high:
            return wilson_interval(min(max(sum(means), 0.0), float(len(means))), len(means))
        return interval

    def metrics(self) -> dict[str, float]:
        """The figures to tell in an event: exact match with the ends of its interval, counts, and each suite's exact match."""
        low, high = self.exact_match_interval
        return {
            "exact_match": self.exact_match,
            "exact_match_low": low,
            "exact_match_high": high,
            "questions": float(self.questions),
            "episodes": float(len(self.episodes)),
            "turns_per_episode": self.turns_per_episode,
            **{f"exact_match/{suite}": part.exact_match for suite, part in self.by_data_source.items()},
        }

    @cached_property
    def f1(self) -> float:
        """Mean token F1 against the best golden answer (reward part ``f1``); NaN when it was not scored."""
        if not any("f1" in episode.reward_parts for episode in self.finished):
            return math.nan
        return _mean_of_questions(self._scores("f1"))

    @cached_property
    def turns_per_episode(self) -> float:
        return _mean(len(episode.turns) for episode in self.finished)

    @cached_property
    def valid_call_fraction(self) -> float:
        """Share of tool calls that could be read; NaN when the model made none."""
        return _mean(float(call.problem is None) for episode in self.finished for call in episode.calls)

    @cached_property
    def answer_in_passage(self) -> float:
        """Share of episodes in which a golden answer stood in a passage that the model was shown."""
        return _mean(float(answer_in_passage(episode)) for episode in self.finished)

    @cached_property
    def stop_fractions(self) -> Mapping[str, float]:
        """``stop/<reason>`` as fractions of all episodes, failed ones too."""
        return stop_fractions(self.episodes)

    @property
    def by_data_source(self) -> dict[str, Evaluation]:
        """The same for each suite by itself."""
        return self._split(lambda episode: episode.question.data_source)

    @property
    def by_hop(self) -> dict[str, Evaluation]:
        """The same by ``question.metadata["hop"]``; questions without it are left out."""
        return self._split(lambda episode: episode.question.metadata.get("hop"))

    def point(self) -> EvaluationPoint:
        """Where it stands in the learning curve."""
        return EvaluationPoint(self.label, self.step, self.exact_match, *self.exact_match_interval)

    def view(self, path: str | Path | None = None) -> Path | CellView:
        """Its episodes in the viewer: filter, sort, read.

        Args:
            path: writes one self-contained HTML page there and returns its path; None shows it in the notebook's cell.

        Raises:
            OSError: ``path`` cannot be written.
        """
        page = page_of(self.episodes, title=f"Episodes of {self.label}", label=self.label, step=self.step)
        if path is None:
            return CellView(page)
        Path(path).write_text(page, encoding="utf-8", newline="\n")
        return Path(path)

    def to_frame(self) -> pl.DataFrame:
        """One row for each episode, with the columns of :data:`searchr1_async.watch.rows.EPISODE_SCHEMA`."""
        return episodes_frame(evaluation_rows(self.label, self.episodes, self.step))

    def _scores(self, part: str) -> dict[QuestionKey, list[float]]:
        """The samples' scores for each question that has a finished episode."""
        scores: dict[QuestionKey, list[float]] = defaultdict(list)
        for episode in self.finished:
            scores[question_key(episode)].append(float(episode.reward_parts.get(part, 0.0)))
        return scores

    def _split(self, key: Callable[[Episode], object]) -> dict[str, Evaluation]:
        parts: dict[str, list[Episode]] = defaultdict(list)
        for episode in self.episodes:
            if (name := key(episode)) is not None:
                parts[str(name)].append(episode)
        return {name: Evaluation(name, tuple(parts[name]), self.step) for name in sorted(parts)}


def compare(before: Evaluation, after: Evaluation, part: str = "correct", *, seed: int = 0) -> PairedDifference:
    """How much better ``after`` is, paired by question.

    Questions of which every episode failed on one side are left out of both.

    Args:
        before: the earlier evaluation.
        after: the later one, of the same questions in any order.
        part: the reward part that is compared.
        seed: of the bootstrap.

    Raises:
        ConfigurationError: the two did not ask the same questions, or have no finished one in common.
    """
    asked_before = {question_key(episode) for episode in before.episodes}
    asked_after = {question_key(episode) for episode in after.episodes}
    if asked_before != asked_after:
        raise ConfigurationError(
            f"{before.label!r} and {after.label!r} cannot be compared: {len(asked_before - asked_after)} questions are "
            f"only in the first and {len(asked_after - asked_before)} only in the second; evaluate both on one suite"
        )
    scores_before, scores_after = before._scores(part), after._scores(part)
    common = [key for key in scores_before if key in scores_after]
    if not common:
        raise ConfigurationError(f"{before.label!r} and {after.label!r} have no finished question in common")
    return paired_difference([scores_before[key] for key in common], [scores_after[key] for key in common], seed=seed)


def question_key(episode: Episode) -> QuestionKey:
    """What makes a question the same question in two evaluations."""
    question = episode.question
    return question.data_source, question.id, question.question


def _mean_of_questions(scores: Mapping[QuestionKey, list[float]]) -> float:
    return _mean(float(np.mean(samples)) for samples in scores.values())


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else math.nan

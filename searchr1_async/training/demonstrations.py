"""Demonstrations: scripted episodes with real search, for a supervised warm-up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from searchr1_async.config import EpisodeLimits
from searchr1_async.data.layouts import LayoutError, read_texts
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import SampledTurn, SearchTool, play
from searchr1_async.episodes.reward import normalize_answer
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.errors import QuestionsError, TooManyFailuresError


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A scripted episode: one search per turn, then a golden answer found in the passages.

    A single string as ``searches`` is the only search.

    Raises:
        QuestionsError: the question has no golden answer.
    """

    question: Question
    searches: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.searches, str):
            object.__setattr__(self, "searches", (self.searches,))
        self.question.check_scorable()

    @classmethod
    def of(cls, question: Question) -> Demonstration:
        """Uses the question's ``search_queries`` metadata, or else the question itself as the only search."""
        given = question.metadata.get("search_queries")
        try:
            return cls(question, read_texts(given) or (question.question,))
        except LayoutError as error:
            raise QuestionsError(f"question {question.id!r} has invalid search_queries: {error}") from error


class DemonstrationPolicy:
    """Policy that writes the scripted turns."""

    def __init__(self, demonstration: Demonstration, dialect: Dialect) -> None:
        self._searches = list(demonstration.searches)
        self._golden = demonstration.question.golden_answers
        self._dialect = dialect

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        """The next search, or a golden answer, preferably one that appears verbatim in the prompt."""
        if self._searches:
            tokens = self._dialect.write_call([self._searches.pop(0)])
        else:
            seen = self._dialect.decode(prompt_tokens)
            literal = [answer for answer in self._golden if answer in seen]
            tokens = self._dialect.write_answer(literal[0] if literal else self._golden[0])
        return SampledTurn(tuple(tokens), (0.0,) * len(tokens), truncated=len(tokens) > max_tokens, policy_version=0)


async def play_demonstrations(
    demonstrations: Sequence[Demonstration],
    *,
    dialect: Dialect,
    search: SearchTool,
    limits: EpisodeLimits,
    max_failed_fraction: float = 1.0,
    max_in_flight: int = 2000,
) -> list[Episode]:
    """Runs demonstrations concurrently; returns, in order, those whose answer appears in a retrieved passage.

    Args:
        max_failed_fraction: tolerated fraction of failures.
        max_in_flight: concurrent demonstrations.

    Raises:
        TooManyFailuresError: the fraction was exceeded.
    """
    played: list[Episode | None] = [None] * len(demonstrations)
    slots = anyio.Semaphore(max_in_flight)

    async def one(place: int) -> None:
        demonstration = demonstrations[place]
        policy = DemonstrationPolicy(demonstration, dialect)
        async with slots:
            played[place] = await play(
                demonstration.question, dialect=dialect, policy=policy, search=search, limits=limits
            )

    async with anyio.create_task_group() as tasks:
        for place in range(len(demonstrations)):
            tasks.start_soon(one, place)
    failed = [episode for episode in played if episode is not None and episode.failed]
    if len(failed) > max_failed_fraction * len(demonstrations):
        raise TooManyFailuresError(
            f"{len(failed)} of {len(demonstrations)} demonstrations failed (allowed: {max_failed_fraction:.0%}); last error: "
            f"{failed[-1].error}. Fix the service and resume."
        )
    return [episode for episode in played if episode is not None and _is_worth_learning(episode)]


def _is_worth_learning(episode: Episode) -> bool:
    if episode.stop_reason is not StopReason.ANSWER or episode.answer is None:
        return False
    shown = " ".join(
        normalize_answer(f"{passage.title} {passage.text}")
        for call in episode.calls
        for passages in call.results
        for passage in passages
    )
    return f" {normalize_answer(episode.answer)} " in f" {shown} "


def demonstration_batches(
    episodes: Sequence[Episode], *, steps: int, batch_size: int, seed: int
) -> list[list[Episode]]:
    """``steps`` batches that cycle through all episodes, reshuffled with the seed on each pass."""
    generator = random.Random(f"warm-up/{seed}")
    pool: list[Episode] = []
    batches = []
    for _ in range(steps):
        while len(pool) < batch_size:
            again = list(episodes)
            generator.shuffle(again)
            pool.extend(again)
        batches.append(pool[:batch_size])
        del pool[:batch_size]
    return batches

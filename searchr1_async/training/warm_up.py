"""The supervised warm-up: demonstrations, which are scripted episodes with real search, and training on them.

Only demonstrations whose answer appears in a retrieved passage are trained on. The batches depend on the seed and on what the
search returns; the progress is saved after every step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio

from searchr1_async.config import EpisodeLimits, WarmUp
from searchr1_async.data.layouts import LayoutError, read_texts
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import SampledTurn, SearchTool, play
from searchr1_async.episodes.reward import normalize_answer
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.errors import QuestionsError, TooManyFailuresError
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.runs.checkpoints import WarmUpPlace
from searchr1_async.runs.control import RunControl
from searchr1_async.training.learner import Learner


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


def chosen_demonstrations(questions: Sequence[Question], warm_up: WarmUp, *, seed: int) -> tuple[Demonstration, ...]:
    """Demonstrations of random questions: half as many again as are wanted, since a search does not always find the answer."""
    wanted = warm_up.steps * warm_up.batch_size
    count = min(len(questions), wanted + wanted // 2)
    return tuple(map(Demonstration.of, random.Random(f"demonstrations/{seed}").sample(questions, count)))


async def run_warm_up(
    learner: Learner,
    batches: Sequence[Sequence[Episode]],
    place: WarmUpPlace | None,
    save: Callable[[WarmUpPlace], Awaitable[None]],
    *,
    learning_rate: float,
    control: RunControl,
    emit: Emit,
) -> None:
    """Trains on the remaining batches; the learning rate falls linearly to a tenth.

    Args:
        place: an earlier session's progress, to which the weights belong; None at the start.
        save: saves the progress and current weights; called after every step.

    Raises:
        SearchR1Error: a service failed.
    """
    digest = await anyio.to_thread.run_sync(_digest, batches)
    if place is None:
        await save(WarmUpPlace(0, digest))
    elif place.batches != digest:
        emit(
            Notice(
                "the warm-up continues with different demonstrations: others were given, or the search returned "
                "other passages. Its finished steps are kept.",
                is_warning=True,
            )
        )
    first, began = 0 if place is None else place.step, anyio.current_time()
    emit(PhaseStarted("warm-up", len(batches), "steps"))
    if first:
        emit(Notice(f"the warm-up continues after step {first} of {len(batches)}"))
        emit(PhaseAdvanced("warm-up", first))
    for done, batch in enumerate(batches[first:], first):
        await control.wait_while_paused()
        loss = await learner.supervised_step(batch, learning_rate * (1 - 0.9 * done / len(batches)))
        await save(WarmUpPlace(done + 1, digest))
        emit(PhaseAdvanced("warm-up", done + 1, {"loss": loss}))
    emit(PhaseEnded("warm-up", anyio.current_time() - began))


def _digest(batches: Sequence[Sequence[Episode]]) -> str:
    """Digest of all batches' tokens, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for episode in batch:
            digest.update(repr(episode.tokens).encode())
    return digest.hexdigest()[:16]

"""The supervised warm-up of a run, saved after every step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio

from searchr1_async.config import WarmUp
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import SearchR1Error
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.runs.checkpoints import WarmUpPlace
from searchr1_async.runs.control import RunControl
from searchr1_async.training.demonstrations import Demonstration, demonstration_batches, play_demonstrations
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.learner import Learner


@dataclass(frozen=True, slots=True)
class WarmingUp:
    """The warm-up of one session, from its start or the last saved step."""

    job: TrainingJob
    warm_up: WarmUp
    engine: RolloutEngine
    control: RunControl
    emit: Emit

    async def run(
        self, learner: Learner, place: WarmUpPlace | None, keep: Callable[[WarmUpPlace], Awaitable[None]]
    ) -> None:
        """Runs the demonstrations through the search and trains on the remaining batches.

        Args:
            place: an earlier session's progress, to which the weights belong; None at the start.
            keep: saves the progress and current weights; called after every step.

        Raises:
            SearchR1Error: no demonstration shows its answer, or a service failed.
        """
        batches = await self._batches()
        digest = await anyio.to_thread.run_sync(_digest, batches)
        if place is None:
            await keep(WarmUpPlace(0, digest))
        elif place.batches != digest:
            self.emit(
                Notice(
                    "the warm-up continues with different demonstrations: others were given, or the search returned "
                    "other passages. Its finished steps are kept.",
                    is_warning=True,
                )
            )
        first = 0 if place is None else place.step
        began = anyio.current_time()
        self.emit(PhaseStarted("warm-up", len(batches), "steps"))
        if first:
            self.emit(Notice(f"the warm-up continues after step {first} of {len(batches)}"))
            self.emit(PhaseAdvanced("warm-up", first))
        elif self.job.start is not None:
            self.emit(Notice("the warm-up starts from the weights of start_from"))
        for done, batch in enumerate(batches[first:], first):
            await self.control.wait_while_paused()
            rate = self.warm_up.learning_rate * (1 - 0.9 * done / len(batches))
            loss = await learner.supervised_step(batch, rate)
            await keep(WarmUpPlace(done + 1, digest))
            self.emit(PhaseAdvanced("warm-up", done + 1, {"loss": loss}))
        self.emit(PhaseEnded("warm-up", anyio.current_time() - began))

    async def _batches(self) -> list[list[Episode]]:
        job, warm_up = self.job, self.warm_up
        wanted = warm_up.steps * warm_up.batch_size
        # Try half as many again, since a search does not always find the answer.
        tried = job.demonstrations or tuple(
            Demonstration.of(question)
            for question in random.Random(f"demonstrations/{job.learning.seed}").sample(
                job.questions, min(len(job.questions), wanted + wanted // 2)
            )
        )
        episodes = await play_demonstrations(
            tried,
            dialect=self.engine.dialect,
            search=job.search,
            limits=job.limits,
            max_failed_fraction=job.learning.max_failed_fraction,
            max_in_flight=job.sampling.max_episodes_in_flight,
        )
        if not episodes:
            raise SearchR1Error(
                f"none of {len(tried)} demonstrations found a golden answer: check that the corpus answers the questions"
            )
        self.emit(Notice(f"{len(episodes)} of {len(tried)} demonstrations found their answer and are trained on"))
        return demonstration_batches(
            episodes, steps=warm_up.steps, batch_size=warm_up.batch_size, seed=job.learning.seed
        )


def _digest(batches: Sequence[Sequence[Episode]]) -> str:
    """Digest of all batches' tokens, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for episode in batch:
            digest.update(repr(episode.tokens).encode())
    return digest.hexdigest()[:16]

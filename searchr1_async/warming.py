"""The supervised warm-up of a run: demonstrations are played, and learned from in steps that are each kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio

from searchr1_async.config import WarmUp
from searchr1_async.control import RunControl
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import SearchR1Error
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.job import TrainingJob
from searchr1_async.learn.checkpoints import WarmUpPlace
from searchr1_async.learn.demonstrations import Demonstration, demonstration_batches, play_demonstrations
from searchr1_async.learn.learner import Learner
from searchr1_async.rollout.engine import RolloutEngine


@dataclass(frozen=True, slots=True)
class WarmingUp:
    """The warm-up of one session, from its start or from the last step that an earlier session kept."""

    job: TrainingJob
    warm_up: WarmUp
    engine: RolloutEngine
    control: RunControl
    emit: Emit

    async def run(
        self, learner: Learner, place: WarmUpPlace | None, keep: Callable[[WarmUpPlace], Awaitable[None]]
    ) -> None:
        """Plays the demonstrations, and learns from those batches that are left.

        Args:
            place: where an earlier session stood; None at the start. The weights are those of this place.
            keep: writes down where the warm-up stands, with the weights as they are; called after every step.

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
                    "the warm-up goes on with other demonstrations than it was begun with: others were given, or the search brought "
                    "other passages. Its finished steps are kept.",
                    is_warning=True,
                )
            )
        first = 0 if place is None else place.step
        began = anyio.current_time()
        self.emit(PhaseStarted("warm-up", len(batches), "steps"))
        if first:
            self.emit(Notice(f"the warm-up goes on after step {first} of {len(batches)}"))
            self.emit(PhaseAdvanced("warm-up", first))
        elif self.job.start is not None:
            self.emit(Notice("the warm-up goes on from the weights that the run starts from"))
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
        # Half as many again are tried, since a search does not always show the answer.
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
                f"none of {len(tried)} demonstrations showed a golden answer: check that the corpus answers the questions"
            )
        self.emit(Notice(f"{len(episodes)} of {len(tried)} demonstrations show their answer and are learned from"))
        return demonstration_batches(
            episodes, steps=warm_up.steps, batch_size=warm_up.batch_size, seed=job.learning.seed
        )


def _digest(batches: Sequence[Sequence[Episode]]) -> str:
    """Of the tokens of all batches, in their order."""
    digest = hashlib.sha256()
    for batch in batches:
        for episode in batch:
            digest.update(repr(episode.tokens).encode())
    return digest.hexdigest()[:16]

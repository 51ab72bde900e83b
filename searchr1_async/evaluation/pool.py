"""Rolls out an evaluation as one pool over systems and suites; episodes are written soon after they end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import anyio

from searchr1_async.boundary.waits import GatheredItems
from searchr1_async.episodes.types import Episode, Group, Question
from searchr1_async.errors import CheckpointError
from searchr1_async.evaluation.store import EpisodeStore, PlayedSample, SampleKey
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, PhaseAdvanced, emit_nothing
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.runs.rollouts import RunningMeans

_WRITE_INTERVAL = 1.0
"""Seconds between coalesced writes; a kill loses at most this much beside episodes in flight. Shorter costs more CPU."""


class EpisodeWriter(GatheredItems[PlayedSample]):
    """Coalesces finished episodes and writes them in a worker thread. :meth:`writing` raises CheckpointError in a group."""

    def __init__(self, store: EpisodeStore) -> None:
        super().__init__(self._put, _WRITE_INTERVAL)
        self._store = store

    async def _put(self, played: list[PlayedSample]) -> None:
        try:
            await anyio.to_thread.run_sync(self._store.write, played)
        except OSError as error:
            raise CheckpointError(
                f"the episodes could not be written to {self._store.folder}: {error.strerror or error}. Earlier episodes "
                "are intact: free disk space and resume."
            ) from error


@dataclass
class PoolProgress:
    """Emits progress as a phase, with running means of the current system."""

    samples: int
    emit: Emit
    done: int = 0
    """Finished episodes, including those of earlier sessions."""
    _means: dict[str, RunningMeans] = field(default_factory=dict)

    def add(self, label: str, group: Group, episodes: int) -> None:
        means = self._means.setdefault(label, RunningMeans())
        means.add(group, self.samples)
        self.done += episodes
        self.emit(PhaseAdvanced("evaluate", self.done, means.metrics()))


@dataclass(frozen=True)
class Pool:
    """The questions of all suites and the samples already finished."""

    questions: Sequence[Question]
    order: Sequence[int]
    """Question indices in rollout order."""
    samples: int
    """Per question and system."""
    done: Collection[SampleKey]
    writer: EpisodeWriter

    def open_samples(self, label: str) -> Iterable[tuple[int, tuple[int, ...]]]:
        """Question indices with missing samples, each with the missing sample numbers."""
        for place in self.order:
            samples = tuple(number for number in range(self.samples) if (label, place, number) not in self.done)
            if samples:
                yield place, samples

    def count_open(self, label: str) -> int:
        return sum(len(samples) for _, samples in self.open_samples(label))

    async def play(
        self, engine: RolloutEngine, systems: Sequence[tuple[MeasuredSystem, TinkerPolicy]], progress: PoolProgress
    ) -> None:
        """Rolls out missing samples system by system; the next starts while the last episodes of the previous finish."""
        # Silences training-episode events: the phase reports progress.
        engine = replace(engine, group_size=self.samples, emit=emit_nothing)
        await engine.play_groups(self._groups(engine, systems, progress))

    def _groups(
        self, engine: RolloutEngine, systems: Sequence[tuple[MeasuredSystem, TinkerPolicy]], progress: PoolProgress
    ) -> Iterator[GroupToPlay]:
        for measured, policy in systems:
            budget = engine.failure_budget(len(self.questions))
            for place, samples in self.open_samples(measured.label):
                yield GroupToPlay(
                    engine.task(place, self.questions[place], key="0", members=samples),
                    policy,
                    budget,
                    partial(progress.add, measured.label, episodes=len(samples)),
                    partial(self._take, measured, place),
                )

    def _take(self, measured: MeasuredSystem, place: int, sample: int, episode: Episode) -> None:
        self.writer.take(((measured.label, place, sample), measured.weights.step, episode))

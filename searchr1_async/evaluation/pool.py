"""Playing an evaluation: every system's questions of every suite in one pool, each episode on disk soon after it has ended."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import anyio

from searchr1_async.episodes.types import Episode, Group, Question
from searchr1_async.errors import CheckpointError
from searchr1_async.evaluation.measure import RunningMeans
from searchr1_async.evaluation.store import EpisodeStore, PlayedSample, SampleKey
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, PhaseAdvanced, emit_nothing
from searchr1_async.gathered import GatheredItems
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine
from searchr1_async.rollout.policy import TinkerPolicy

_GATHERING = 1.0
"""Seconds in which finished episodes gather for one file: what a kill may cost beside what is under way. In 0.25 s 4 gathered,
which took 4.0 ms of CPU each; 16 take 1.1 ms each."""


class EpisodeWriter(GatheredItems[PlayedSample]):
    """Takes episodes as they end and puts them on disk, many at a time, in a worker thread.

    :meth:`writing` raises CheckpointError where the folder cannot be written, within an exception group.
    """

    def __init__(self, store: EpisodeStore) -> None:
        super().__init__(self._put, _GATHERING)
        self._store = store

    async def _put(self, played: list[PlayedSample]) -> None:
        try:
            await anyio.to_thread.run_sync(self._store.write, played)
        except OSError as error:
            raise CheckpointError(
                f"the episodes could not be written to {self._store.folder}: {error.strerror or error}. What was written "
                "before is whole: make room and resume."
            ) from error


@dataclass
class PoolProgress:
    """How far the playing is, told as a phase; its figures are those so far of the system that is being played."""

    samples: int
    emit: Emit
    done: int = 0
    """Episodes, those of an earlier session included."""
    _means: dict[str, RunningMeans] = field(default_factory=dict)

    def add(self, label: str, group: Group, episodes: int) -> None:
        """A question of a system has been played."""
        means = self._means.setdefault(label, RunningMeans())
        means.add(group, self.samples)
        self.done += episodes
        self.emit(PhaseAdvanced("evaluate", self.done, means.metrics()))


@dataclass(frozen=True)
class Pool:
    """What is asked and what of it is done, over all systems.

    Args:
        questions: of all suites.
        order: the places of the questions, in the order in which they are begun.
        samples: episodes a question and system.
        done: samples that need not be played again.
        writer: takes finished episodes.
    """

    questions: Sequence[Question]
    order: Sequence[int]
    samples: int
    done: Collection[SampleKey]
    writer: EpisodeWriter

    def open_samples(self, label: str) -> Iterable[tuple[int, tuple[int, ...]]]:
        """The places that a system has to play yet, each with the numbers of the samples."""
        for place in self.order:
            samples = tuple(number for number in range(self.samples) if (label, place, number) not in self.done)
            if samples:
                yield place, samples

    def count_open(self, label: str) -> int:
        """Samples that a system has to play yet."""
        return sum(len(samples) for _, samples in self.open_samples(label))

    async def play(
        self, engine: RolloutEngine, systems: Sequence[tuple[MeasuredSystem, TinkerPolicy]], progress: PoolProgress
    ) -> None:
        """Plays what these systems have open: one after the other, the next beginning while the last episodes of the one before
        are under way.

        Raises, within an exception group, what the engine raises.
        """
        # An evaluation's episodes are no training episodes: the phase's progress stands for them.
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

"""Records a run's steps in order, each with its resume point, and keeps finished groups on disk until a step contains them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial

import anyio

from searchr1_async.boundary.waits import GatheredWriting
from searchr1_async.episodes.types import Group
from searchr1_async.errors import ServiceError
from searchr1_async.events import CheckpointSaved, Emit, StepFinished
from searchr1_async.records.metrics import group_metrics, outcome_metrics
from searchr1_async.records.run_records import GroupOutcome, RunRecords
from searchr1_async.runs.checkpoints import CheckpointList, ResumePoint
from searchr1_async.runs.finished_groups import UnlearnedGroups
from searchr1_async.runs.folder import writing_records
from searchr1_async.search.stats import SearchStatistics
from searchr1_async.service.connection import Service
from searchr1_async.training.batches import advantages
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.learner import FinishedStep
from searchr1_async.training.spending import Spending

logger = logging.getLogger(__name__)

_GATHERING = 0.2
"""Seconds in which finished groups gather for one write: what a kill may cost."""


@dataclass
class StepToRecord:
    """A rolled-out batch and its times."""

    step: int
    outcomes: tuple[GroupOutcome, ...]
    """All its groups, dropped ones included."""
    searched: SearchStatistics
    """Searches while the batch was open, those of a concurrent evaluation included."""
    engine: Mapping[str, float]
    """The engine's metrics when it closed, those of a concurrent evaluation included."""
    opened: float
    closed: float
    is_checkpoint: bool = False
    """Its weights are kept permanently."""
    published: float = math.nan
    """When its new weights were published; all times in seconds of the run's pausable clock."""


class StepRecorder:
    """Writes finished steps, then their resume points: a resume point must never exist without its records."""

    def __init__(
        self,
        job: TrainingJob,
        records: RunRecords,
        service: Service,
        point: ResumePoint,
        kept: CheckpointList,
        *,
        total: int,
        spending: Spending,
        emit: Emit,
    ) -> None:
        self.spending = spending
        """What the run used and spent so far."""
        self._job, self._records, self._service, self._emit = job, records, service, emit
        self._kept, self._total = kept, total
        self.point = point
        """Where the run stands on disk."""
        # The mean of earlier sessions, where none was seen in this one.
        self.longest_step = point.seconds / point.step if point.step else 0.0
        """Seconds between two steps' weights, the longest so far."""
        self._began = self._last_published = 0.0
        self._before = point.seconds

    def begin(self, now: float) -> None:
        """The first step begins."""
        self._began = self._last_published = now
        self.spending.begin()

    async def record(
        self, played: StepToRecord, finished: FinishedStep, *, next_place: int, open_places: tuple[int, ...]
    ) -> None:
        """Writes one step down and tells of it; steps come in order.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        total = played.published - self._last_published
        self._last_published = played.published
        self.longest_step = max(self.longest_step, total)
        metrics = {
            "progress/batch": float(played.step),
            "progress/done_frac": min(1.0, played.step / self._total),
            # In a thread: 1,024 episodes take 0.1 s.
            **await anyio.to_thread.run_sync(partial(self._played_metrics, played)),
            **played.searched.metrics(),
            **played.engine,
            **finished.metrics,
            **self.spending.step_recorded(),
            "time/total": total,
            "time/sampling": played.closed - played.opened,
            "time/training_after_sampling": played.published - played.closed,
        }
        before, sampler_path = self.point, finished.sampler_path
        is_newest = sampler_path is not None and played.is_checkpoint
        new = replace(
            self.spending.written_into(before),
            step=played.step,
            next_place=next_place,
            open_places=open_places,
            state_path=finished.state_path,
            sampler_path=sampler_path if is_newest else before.sampler_path,
            sampler_step=played.step if is_newest else before.sampler_step,
            seconds=self._before + played.published - self._began,
        )

        def write() -> None:
            with writing_records(self._job.out_dir):
                kind = self._job.learning.advantage
                self._records.write_step(
                    played.step, played.outcomes, metrics, lambda rewards: advantages(rewards, kind)
                )
                if sampler_path is not None:
                    self._kept.add(
                        played.step, sampler_path, for_good=played.is_checkpoint, state_path=finished.state_path
                    )
            new.save(self._job.out_dir)

        # Shielded: a stop must not fall between a step and its record.
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(write)
            self.point = new
        self._emit(CheckpointSaved(played.step, new.state_path))
        self._emit(StepFinished(played.step, metrics))
        if before.step and not self._kept.holds_state(before.state_path):
            await delete_checkpoints(self._service, [before.state_path])

    def _played_metrics(self, played: StepToRecord) -> Mapping[str, float]:
        groups = [outcome.group for outcome in played.outcomes]
        return {
            **group_metrics(groups, policy_version=played.step - 1),
            **outcome_metrics(played.outcomes),
        }


class Keeper:
    """Saves finished groups on disk, until a recorded step contains them."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._groups = UnlearnedGroups(job.out_dir / "unlearned")
        self._new: list[tuple[int, Group]] = []
        self._done: set[int] = set()
        self._gathered = GatheredWriting(self._write, _GATHERING)

    async def load(self) -> dict[int, Group]:
        """What an earlier session left, by place."""
        return await anyio.to_thread.run_sync(self._groups.load)

    async def clear(self) -> None:
        """Forgets what another run may have left in this folder."""
        await anyio.to_thread.run_sync(self._groups.clear)

    def keep(self, place: int, group: Group) -> None:
        """Writes this group soon."""
        self._new.append((place, group))
        self._gathered.want()

    def forget(self, places: Collection[int]) -> None:
        """Recorded steps hold these, or nobody wants them: they may go."""
        self._done.update(places)
        self._gathered.want()

    def keeping(self) -> AbstractAsyncContextManager[None]:
        """Writes while the block runs, and what is left at its end, however that comes.

        Raises, within an exception group:
            CheckpointError: the folder cannot be written.
        """
        return self._gathered.writing()

    async def _write(self) -> None:
        new, self._new = self._new, []
        done, self._done = self._done, set()

        def write() -> None:
            with writing_records(self._job.out_dir):
                if kept := [(place, group) for place, group in new if place not in done]:
                    self._groups.write(kept)
                if done:
                    self._groups.forget(done)

        if new or done:
            # Shielded: what was taken from the list must reach the disk, though the run is stopped just now.
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(write)


async def forget_attempt(job: TrainingJob, records: RunRecords, kept: CheckpointList, service: Service) -> None:
    """Deletes what an earlier attempt in the run's folder has left that came to no step: its untrained measurement, its finished
    groups, its resume point, and its weights at the service. What cannot be deleted there costs only room.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def forget() -> list[str]:
        point = ResumePoint.load(job.out_dir)
        with writing_records(job.out_dir):
            records.truncate_after(-1)
            paths = [path for one in kept.clear() for path in one.paths]
            ResumePoint.forget(job.out_dir)
        return paths if point is None else [*paths, point.state_path]

    gone = await anyio.to_thread.run_sync(forget)
    await Keeper(job).clear()
    await delete_checkpoints(service, gone)


async def delete_checkpoints(service: Service, paths: Iterable[str]) -> None:
    """Deletes at the service what no file of the run names any more; what cannot be deleted costs only room."""
    for path in paths:
        try:
            await service.delete_checkpoint(path)
        except ServiceError as error:
            logger.info("%s was not deleted: %s", path, error)

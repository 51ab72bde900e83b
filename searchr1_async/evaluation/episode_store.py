"""An evaluation's folder, and the pool that fills it. Episodes are written soon after they end, so a kill loses only those in flight.

::

    <folder>/manifest.json             what is measured (:mod:`.manifest`)
    <folder>/questions.parquet         the questions, suite after suite
    <folder>/episodes/000012.parquet   episodes in completion order (:class:`~searchr1_async.records.run_records.EvaluationParts`)
    <folder>/judgements.parquet        the judge's verdicts, if any

Methods that touch the disk block: call them in a worker thread.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import anyio
import polars as pl

from searchr1_async.boundary.paths import remove_leftovers, write_parquet
from searchr1_async.boundary.tables import read_parquet
from searchr1_async.boundary.waits import GatheredItems
from searchr1_async.episodes.table import EpisodeRow, episode_from_row
from searchr1_async.episodes.types import Episode, Group, Question
from searchr1_async.errors import CheckpointError, RunFolderError
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, PhaseAdvanced, emit_nothing
from searchr1_async.records.run_records import EvaluationParts
from searchr1_async.records.scores import SCORE_SCHEMA, score_frame
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.runs.rollouts import RunningMeans

JUDGEMENTS_NAME = "judgements.parquet"
_KEY = ["system", "place", "sample"]
_JUDGEMENTS = pl.Schema({"system": pl.String, "place": pl.Int64, "sample": pl.Int64, "judged": pl.Float64})
SampleKey = tuple[str, int, int]
"""System, index of the question, sample number."""
PlayedSample = tuple[SampleKey, int | None, Episode]
"""A sample, the optimiser step of its weights, and its episode."""


class EpisodeStore:
    """Episodes of one evaluation on disk, and their scores in memory.

    Args:
        folder: None uses a temporary folder that is deleted with this object.
    """

    def __init__(self, folder: Path | None) -> None:
        self.is_kept = folder is not None
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="searchr1-evaluation-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self._parts = EvaluationParts(folder / "episodes")
        self._lock = threading.Lock()
        self._scores: list[pl.DataFrame] = []
        self._judgements = pl.DataFrame(schema=_JUDGEMENTS)

    # --- writing ------------------------------------------------------------------------------------------------------

    def load(self) -> set[SampleKey]:
        """Loads an earlier session; returns its finished samples. Call it before :meth:`write`. Raises RunFolderError."""
        with self._lock, _reading(self.folder):
            remove_leftovers(self._parts.folder)
            self._scores = [_scores_of(read_parquet(path)) for path in self._parts.paths()]
            if (path := self.folder / JUDGEMENTS_NAME).exists():
                self._judgements = read_parquet(path)
        scores = self._latest()
        rows = scores.filter(~pl.col("failed")).select(_KEY).iter_rows()
        return {(system, place, sample) for system, place, sample in rows}

    def write(self, played: Sequence[PlayedSample]) -> None:
        """Writes finished episodes, failed ones included. Raises OSError if the folder cannot be written."""
        if not played:
            return
        rows = [
            EpisodeRow(episode, step, label, group=place, member=sample, trained=False)
            for (label, place, sample), step, episode in played
        ]
        with self._lock:
            self._parts.write(rows)
            self._scores.append(_scored(played))

    def finish(self) -> None:
        """Merges small files and drops superseded records; safe against a kill. Raises OSError or RunFolderError."""
        with self._lock:
            self._parts.merge()

    # --- reading ------------------------------------------------------------------------------------------------------

    def scores(self) -> pl.DataFrame:
        """One row per sample, sorted by system, question and sample: ``SCORE_SCHEMA`` plus ``place``."""
        with self._lock:
            judgements, latest = self._judgements, self._latest()
        return (
            latest.drop("judged")
            .join(judgements, on=_KEY, how="left")
            .select(*SCORE_SCHEMA, "place")
            .sort("system", "place", "sample")
        )

    def unjudged(self, systems: Sequence[str] | None = None) -> pl.DataFrame:
        """Scores of finished samples without a verdict, of all systems or the given ones."""
        with self._lock:
            left = self._latest().filter(~pl.col("failed")).join(self._judgements, on=_KEY, how="anti")
        return left if systems is None else left.filter(pl.col("system").is_in(list(systems)))

    def write_judgements(self, verdicts: Mapping[SampleKey, float | None]) -> None:
        """Adds verdicts: 1 right, 0 wrong, None unreadable. Raises OSError if the folder cannot be written."""
        rows = [(*key, verdict) for key, verdict in verdicts.items()]
        with self._lock:
            self._judgements = pl.concat([self._judgements, pl.DataFrame(rows, schema=_JUDGEMENTS, orient="row")])
            write_parquet(self.folder / JUDGEMENTS_NAME, self._judgements)

    def episodes(self, system: str) -> tuple[Episode, ...]:
        """A system's episodes in question order. Raises RunFolderError if a file cannot be read."""
        with self._lock:
            return self._parts.episodes(system)

    def frame(self) -> pl.LazyFrame:
        """All records in the order they were written, superseded ones included."""
        return self._parts.frame()

    def _latest(self) -> pl.DataFrame:
        empty = pl.DataFrame(schema={**SCORE_SCHEMA, "place": pl.Int64})
        return pl.concat([empty, *self._scores]).unique(_KEY, keep="last", maintain_order=True)


def _scored(played: Sequence[PlayedSample]) -> pl.DataFrame:
    by_system: dict[tuple[str, int | None], list[tuple[int, int, Episode]]] = {}
    for (label, place, sample), step, episode in played:
        by_system.setdefault((label, step), []).append((place, sample, episode))
    return pl.concat(
        [
            score_frame(label, [(sample, episode) for _, sample, episode in own], step).with_columns(
                pl.Series("place", [place for place, _, _ in own], dtype=pl.Int64)
            )
            for (label, step), own in by_system.items()
        ]
    )


def _scores_of(frame: pl.DataFrame) -> pl.DataFrame:
    return _scored(
        [
            ((row["label"], row["group"], row["member"]), row["step"], episode_from_row(row))
            for row in frame.iter_rows(named=True)
        ]
    )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Converts read errors into a RunFolderError."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise RunFolderError(f"an episode file in {folder} cannot be read: {error}") from error


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

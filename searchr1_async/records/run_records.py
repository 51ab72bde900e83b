"""Records of a run or an evaluation as Parquet files.

::

    <run>/episodes/step-000012.parquet   one row per episode of the step (:data:`~searchr1_async.episodes.table.EPISODE_SCHEMA`)
    <run>/groups/step-000012.parquet     one row per group, dropped ones included (:data:`~searchr1_async.episodes.table.GROUP_SCHEMA`)
    <run>/metrics/step-000012.parquet    one row: the step's metrics
    <run>/evaluations/000001.parquet     the episodes of a run's evaluations (:class:`EvaluationParts`)
    <evaluation>/episodes/000001.parquet the same form, of :func:`searchr1_async.evaluate`

Files are written atomically (:func:`~searchr1_async.boundary.paths.write_parquet`), metrics last: a step with metrics is complete. All
methods block on disk I/O: call them from a worker thread. Readers raise :class:`RunFolderError`, naming the file, for one that
is empty, truncated or of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from searchr1_async.boundary.paths import remove_leftovers, write_parquet
from searchr1_async.boundary.tables import is_whole, read_parquet, scan_parquet, scan_rows
from searchr1_async.episodes.table import (
    EPISODE_SCHEMA,
    GROUP_SCHEMA,
    Advantages,
    EpisodeRow,
    GroupOutcome,
    centred,
    episode_from_row,
    episodes_frame,
    evaluation_rows,
    groups_frame,
    step_rows,
    storable,
)
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import RunFolderError

__all__ = ["GroupOutcome", "RunRecords"]

_METRICS = pl.Schema({"step": pl.Int64})
_STEP_FILE = re.compile(r"step-(\d{6,})\.parquet")


class RunRecords:
    """Reads and writes the records below ``folder``; the folder is created on first write.

    Reading while a run writes is safe. Only one writer is allowed; the run's lock ensures it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._episodes = self.folder / "episodes"
        self._groups = self.folder / "groups"
        self._metrics = self.folder / "metrics"
        self._evaluations = EvaluationParts(self.folder / "evaluations")

    def write_step(
        self,
        step: int,
        outcomes: Sequence[GroupOutcome],
        metrics: Mapping[str, float],
        advantages: Advantages = centred,
    ) -> None:
        """Record one finished step, replacing an earlier record of it.

        Args:
            step: optimiser steps finished, this one included (from 1).
            outcomes: every group of the step, dropped and empty ones included.
            metrics: name to number; a non-number raises before anything is written.
            advantages: the function used in training.

        Raises:
            OSError: the folder is not writable.
        """
        numbers = {storable(name): float(value) for name, value in metrics.items() if name != "step"}
        row = pl.DataFrame({"step": [step], **{name: [value] for name, value in numbers.items()}})
        _write(episodes_frame(step_rows(step, outcomes, advantages)), self._episodes / _step_file(step))
        _write(groups_frame(step, outcomes), self._groups / _step_file(step))
        _write(row.cast({"step": pl.Int64}), self._metrics / _step_file(step))

    def truncate_after(self, step: int) -> None:
        """Remove everything recorded after ``step``, evaluations included: a resumed run redoes those steps."""
        for folder in (self._metrics, self._groups, self._episodes):  # metrics first: a step with metrics is complete
            for number, path in _step_files(folder):
                if number > step:
                    path.unlink(missing_ok=True)
        self._evaluations.truncate_after(step)
        for folder in (self._metrics, self._groups, self._episodes):
            remove_leftovers(folder)

    def metrics(self) -> pl.DataFrame:
        """One row per finished step, in order; metrics missing from a step are null. No steps: no rows.

        Raises:
            RunFolderError: a metrics file is damaged.
        """
        return pl.concat([pl.DataFrame(schema=_METRICS), *map(_metrics, _step_files(self._metrics))], how="diagonal")

    def episodes(self) -> pl.LazyFrame:
        """Every training episode, by step, group and member; an empty frame with the schema if there are none."""
        return scan_rows([_whole(path) for _, path in _step_files(self._episodes)], EPISODE_SCHEMA)

    def groups(self) -> pl.LazyFrame:
        """Every training group, trained on or dropped, by step; an empty frame with the schema if there are none."""
        return scan_rows([_whole(path) for _, path in _step_files(self._groups)], GROUP_SCHEMA)

    def load_episodes(self, step: int) -> tuple[Episode, ...]:
        """The episodes of one step; empty if the step was not recorded."""
        path = self._episodes / _step_file(step)
        return _load(path) if path.exists() else ()

    def load_episode(self, step: int, group: int, member: int) -> Episode | None:
        """One training episode; None if absent."""
        path = self._episodes / _step_file(step)
        if not path.exists():
            return None
        with _reading(path):
            rows = scan_parquet(path).filter(group=group, member=member).collect()
            return episode_from_row(rows.row(0, named=True)) if rows.height else None

    def write_evaluation(self, label: str, episodes: Sequence[Episode], step: int | None = None) -> None:
        """Record one evaluation; the same ``label`` replaces the earlier record in place.

        Args:
            label: name (``untrained``, ``after RL``).
            episodes: in any order, failed ones included.
            step: optimiser steps done before it; None if it belongs to no step.

        Raises:
            OSError: the folder is not writable.
        """
        self._evaluations.replace(label, evaluation_rows(label, episodes, step))

    def evaluations(self) -> pl.LazyFrame:
        """The episodes of all evaluations in order, distinguished by ``label``."""
        return self._evaluations.frame()

    def load_evaluation(self, label: str) -> tuple[Episode, ...]:
        """The episodes of one evaluation, by question and sample; empty if the label is unknown."""
        return self._evaluations.episodes(label)

    def evaluation_labels(self) -> tuple[str, ...]:
        """The labels of the evaluations, in order."""
        return self._evaluations.labels()


_PART = re.compile(r"(\d{3,})(?:-.*)?\.parquet")
"""Version 0.1.0 named a run's parts ``000-untrained.parquet``."""
_RECORD_KEY = ["label", "group", "member"]
_MERGED_ROWS = 1024
"""Episodes per merged part; also bounds the memory of merging (about 300 MB for long episodes)."""


class EvaluationParts:
    """Episodes of evaluations in one folder of numbered Parquet files, in the order they were written.

    ``label`` is the evaluation or the system, ``group`` the question's index, ``member`` the sample. The latest record of a sample
    counts, so a failed episode can be retried. One writer at a time; the folder is created on first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """The parts, in the order they were written."""
        return [path for _, path in self._numbered()]

    def _numbered(self) -> list[tuple[int, Path]]:
        return _numbered_files(self.folder, _PART)

    def write(self, rows: Sequence[EpisodeRow]) -> None:
        """Adds a part. Raises OSError if the folder cannot be written."""
        number = max((number for number, _ in self._numbered()), default=0) + 1
        _write(episodes_frame(rows), self.folder / f"{number:06d}.parquet")

    def replace(self, label: str, rows: Sequence[EpisodeRow]) -> None:
        """Writes the one part of an evaluation, in place of an earlier one with this label; no rows change nothing.

        Raises:
            OSError: the folder cannot be written.
            RunFolderError: a part cannot be read.
        """
        earlier = [path for path in self.paths() if _labels(path) == [storable(label)]] if rows else []
        if earlier:
            _write(episodes_frame(rows), earlier[0])
        elif rows:
            self.write(rows)

    def truncate_after(self, step: int) -> None:
        """Deletes the parts with an episode of a later step, and leftovers of killed writers."""
        for path in self.paths():
            with _reading(path):
                last = read_parquet(path, columns=["step"])["step"].max()
            if isinstance(last, int) and last > step:
                path.unlink(missing_ok=True)
        remove_leftovers(self.folder)

    def frame(self) -> pl.LazyFrame:
        """All records in the order they were written, superseded ones included: :data:`EPISODE_SCHEMA`."""
        return scan_rows(list(map(_whole, self.paths())), EPISODE_SCHEMA)

    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of their first record."""
        return tuple(dict.fromkeys(label for path in self.paths() for label in _labels(path)))

    def episodes(self, label: str) -> tuple[Episode, ...]:
        """The episodes of an evaluation or system, by question and sample; empty if the label is unknown."""
        frames = []
        for path in self.paths():
            with _reading(path):
                frames.append(scan_rows([path], EPISODE_SCHEMA).filter(label=storable(label)).collect())
        if not frames:
            return ()
        rows = latest_records(pl.concat(frames)).sort("group", "member").iter_rows(named=True)
        return tuple(episode_from_row(row) for row in rows)

    def merge(self) -> None:
        """Merges small parts and drops superseded records; safe against a kill. Raises OSError or RunFolderError."""
        parts = _read_parts(self.paths())
        for part in parts:
            if part.latest.is_empty():  # superseded by later parts
                part.path.unlink(missing_ok=True)
        for batch in _batches([part for part in parts if not part.latest.is_empty()]):
            _merge(batch)


def latest_records(frame: pl.DataFrame) -> pl.DataFrame:
    """The latest record of each sample, in order."""
    return frame.unique(_RECORD_KEY, keep="last", maintain_order=True)


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    rows: int
    latest: pl.Series
    """Row numbers that no later row of this or a later part supersedes."""


def _read_parts(paths: Sequence[Path]) -> list[_Part]:
    """Reads only the key columns."""
    frames = []
    for number, path in enumerate(paths):
        with _reading(path):
            frame = read_parquet(path, columns=_RECORD_KEY)
        frames.append(frame.with_row_index("row").with_columns(pl.lit(number, pl.UInt32).alias("part")))
    latest = latest_records(pl.concat(frames)).partition_by("part", as_dict=True) if frames else {}
    none = pl.Series("row", dtype=pl.UInt32)
    return [
        _Part(path, frame.height, latest[number,]["row"] if (number,) in latest else none)
        for number, (path, frame) in enumerate(zip(paths, frames, strict=True))
    ]


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Groups consecutive parts that fit into one; merged parts form batches of one."""
    batch: list[_Part] = []
    rows = 0
    for part in parts:
        if batch and rows + len(part.latest) > _MERGED_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(part)
        rows += len(part.latest)
    if batch:
        yield batch


def _merge(batch: Sequence[_Part]) -> None:
    """Merges parts into the last of them, which keeps the order of records; the others are deleted afterwards.

    A kill in between leaves only superseded records behind.
    """
    *earlier, last = batch
    if not earlier and len(last.latest) == last.rows:
        return
    frames = [scan_rows([part.path], EPISODE_SCHEMA).collect()[part.latest] for part in batch]
    write_parquet(last.path, pl.concat(frames))
    for part in earlier:
        part.path.unlink(missing_ok=True)


def _labels(path: Path) -> list[str]:
    with _reading(path):
        return read_parquet(path, columns=["label"])["label"].unique(maintain_order=True).to_list()


def _step_file(step: int) -> str:
    return f"step-{step:06d}.parquet"


def _step_files(folder: Path) -> list[tuple[int, Path]]:
    return _numbered_files(folder, _STEP_FILE)


def _numbered_files(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Sorted by number: 1,000,000 comes after 999,999."""
    if not folder.is_dir():
        return []
    named = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in named if name)


def _load(path: Path) -> tuple[Episode, ...]:
    with _reading(path):
        return tuple(episode_from_row(row) for row in read_parquet(path).iter_rows(named=True))


def _metrics(file: tuple[int, Path]) -> pl.DataFrame:
    """The row of a step, cast to this version's types."""
    step, path = file
    with _reading(path):
        row = read_parquet(path)
        if row["step"].to_list() != [step]:
            raise _damaged(path, "has no row for this step")
        return row.cast({name: _METRICS.get(name, pl.Float64()) for name in row.columns})


def _whole(path: Path) -> Path:
    if not is_whole(path):
        raise _damaged(path, f"is not a complete Parquet file ({path.stat().st_size:,} bytes)")
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn read errors into :class:`RunFolderError` with the file's name."""
    _whole(path)
    try:
        yield
    except (pl.exceptions.PolarsError, IndexError, KeyError, TypeError) as error:
        raise _damaged(path, f"is not a run record: {type(error).__name__}: {error}") from error


def _damaged(path: Path, problem: str) -> RunFolderError:
    return RunFolderError(
        f"{path} cannot be read: it {problem}. The file is damaged (power loss, interrupted copy) or not from this run. Move it "
        "away to read the others; the run's resume point does not need it."
    )


def _write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, frame)

"""Records of a run or an evaluation as Parquet files.

::

    <run>/episodes/step-000012.parquet   one row per episode of the step (:data:`~searchr1_async.episodes.table.EPISODE_SCHEMA`)
    <run>/groups/step-000012.parquet     one row per group, dropped ones included (:data:`~searchr1_async.episodes.table.GROUP_SCHEMA`)
    <run>/metrics/step-000012.parquet    one row: the step's metrics; written last, so a step with metrics is complete
    <run>/evaluations/000001.parquet     the episodes of a run's evaluations (:class:`EvaluationParts`)
    <evaluation>/episodes/000001.parquet the same form, of :func:`searchr1_async.evaluate`

Methods block on disk I/O: call them from a worker thread. Readers raise :class:`RunFolderError`, naming the file, for one that is
empty, truncated or of another kind; writers raise OSError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import remove_leftovers, write_parquet
from searchr1_async.boundary.tables import is_whole, read_parquet, scan_rows
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

_STEP_FILE = re.compile(r"step-(\d{6,})\.parquet")
_PART = re.compile(r"(\d{3,})(?:-.*)?\.parquet")
"""Version 0.1.0 named a run's parts ``000-untrained.parquet``."""
_RECORD_KEY = ["label", "group", "member"]
_MERGED_ROWS = 1024
"""Episodes per merged part; also bounds the memory of merging (about 300 MB for long episodes)."""


class RunRecords:
    """Reads and writes the records below ``folder``; the folder is created on first write.

    Reading while a run writes is safe. Only one writer is allowed; the run's lock ensures it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._evaluations = EvaluationParts(self.folder / "evaluations")

    def _file(self, kind: str, step: int) -> Path:
        return self.folder / kind / f"step-{step:06d}.parquet"

    def write_step(
        self,
        step: int,
        outcomes: Sequence[GroupOutcome],
        metrics: Mapping[str, float],
        advantages: Advantages = centred,
    ) -> None:
        """Record one finished step, replacing an earlier record of it.

        Args:
            step: optimizer steps finished, this one included (from 1).
            outcomes: every group of the step, dropped and empty ones included.
            metrics: name to number; a non-number raises before anything is written.
            advantages: the function used in training.
        """
        numbers = {storable(name): [float(value)] for name, value in metrics.items() if name != "step"}
        _write(episodes_frame(step_rows(step, outcomes, advantages)), self._file("episodes", step))
        _write(groups_frame(step, outcomes), self._file("groups", step))
        _write(pl.DataFrame({"step": [step], **numbers}), self._file("metrics", step))

    def truncate_after(self, step: int) -> None:
        """Remove everything recorded after ``step``, evaluations included: a resumed run redoes those steps."""
        folders = [self.folder / kind for kind in ("metrics", "groups", "episodes")]
        for folder in folders:  # metrics first: a step with metrics is complete
            for number, path in _numbered(folder, _STEP_FILE):
                if number > step:
                    path.unlink(missing_ok=True)
        self._evaluations.truncate_after(step)
        for folder in folders:
            remove_leftovers(folder)

    def metrics(self) -> pl.DataFrame:
        """One row per finished step, in order; metrics missing from a step are null. No steps: no rows."""
        rows = [_metrics(*file) for file in _numbered(self.folder / "metrics", _STEP_FILE)]
        return pl.concat([pl.DataFrame(schema={"step": pl.Int64}), *rows], how="diagonal")

    def episodes(self) -> pl.LazyFrame:
        """Every training episode, by step, group and member; an empty frame with the schema if there are none."""
        return self._frame("episodes", EPISODE_SCHEMA)

    def groups(self) -> pl.LazyFrame:
        """Every training group, trained on or dropped, by step; an empty frame with the schema if there are none."""
        return self._frame("groups", GROUP_SCHEMA)

    def _frame(self, kind: str, schema: pl.Schema) -> pl.LazyFrame:
        return scan_rows([_whole(path) for _, path in _numbered(self.folder / kind, _STEP_FILE)], schema)

    def load_episodes(self, step: int, *of: pl.Expr) -> tuple[Episode, ...]:
        """The episodes of one step, or those that fulfil conditions; empty if the step was not recorded."""
        path = self._file("episodes", step)
        return tuple(map(episode_from_row, _read(path, *of).iter_rows(named=True))) if path.exists() else ()

    def load_episode(self, step: int, group: int, member: int) -> Episode | None:
        """One training episode; None if absent."""
        return next(iter(self.load_episodes(step, pl.col("group") == group, pl.col("member") == member)), None)

    def write_evaluation(self, label: str, episodes: Sequence[Episode], step: int | None = None) -> None:
        """Record one evaluation; the same ``label`` replaces the earlier record in place.

        Args:
            label: name (``untrained``, ``after RL``).
            episodes: in any order, failed ones included.
            step: optimizer steps done before it; None if it belongs to no step.
        """
        self._evaluations.replace(label, evaluation_rows(label, episodes, step))

    def evaluations(self) -> pl.LazyFrame:
        """The episodes of all evaluations in order, distinguished by ``label``."""
        return self._evaluations.frame()

    def load_evaluation(self, label: str) -> tuple[Episode, ...]:
        """The episodes of one evaluation, by question and sample; empty if the label is unknown."""
        return tuple(row.episode for row in self._evaluations.latest(pl.col("label") == storable(label)))

    def evaluation_labels(self) -> tuple[str, ...]:
        """The labels of the evaluations, in order."""
        return tuple(dict.fromkeys(label for path in self._evaluations.paths() for label in _labels(path)))


class EvaluationParts:
    """Episodes of evaluations in one folder of numbered Parquet files, in the order they were written.

    ``label`` is the evaluation or the system, ``group`` the question's index, ``member`` the sample. The latest record of a sample
    counts, so a failed episode can be retried. One writer at a time; the folder is created on first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """The parts, in the order they were written."""
        return [path for _, path in _numbered(self.folder, _PART)]

    def write(self, rows: Sequence[EpisodeRow]) -> None:
        """Adds a part."""
        number = max((number for number, _ in _numbered(self.folder, _PART)), default=0) + 1
        _write(episodes_frame(rows), self.folder / f"{number:06d}.parquet")

    def replace(self, label: str, rows: Sequence[EpisodeRow]) -> None:
        """Writes the one part of an evaluation, in place of an earlier one with this label; no rows change nothing."""
        earlier = [path for path in self.paths() if _labels(path) == [storable(label)]] if rows else []
        if earlier:
            _write(episodes_frame(rows), earlier[0])
        elif rows:
            self.write(rows)

    def truncate_after(self, step: int) -> None:
        """Deletes the parts with an episode of a later step, and leftovers of killed writers."""
        for path in self.paths():
            if not _read(path, pl.col("step") > step, columns=["step"]).is_empty():
                path.unlink(missing_ok=True)
        remove_leftovers(self.folder)

    def frame(self) -> pl.LazyFrame:
        """All records in the order they were written, superseded ones included: :data:`EPISODE_SCHEMA`."""
        return scan_rows(list(map(_whole, self.paths())), EPISODE_SCHEMA)

    def read(self) -> Iterator[list[EpisodeRow]]:
        """The records of each part."""
        for path in self.paths():
            yield list(map(_row, _read(path).iter_rows(named=True)))

    def latest(self, *of: pl.Expr, keys: pl.DataFrame | None = None) -> list[EpisodeRow]:
        """The latest records of the samples that fulfil conditions, by label, question and sample.

        Args:
            of: conditions that all records of a sample fulfil or none.
            keys: only samples with these values.
        """
        frame = pl.concat([pl.DataFrame(schema=EPISODE_SCHEMA), *(_read(path, *of) for path in self.paths())])
        if keys is not None:
            frame = frame.join(keys, on=keys.columns, how="semi", maintain_order="left")
        return list(map(_row, _latest(frame).sort(_RECORD_KEY).iter_rows(named=True)))

    def merge(self) -> None:
        """Merges neighbouring parts of together at most :data:`_MERGED_ROWS` episodes. Raises OSError or RunFolderError."""
        batch: list[Path] = []
        rows = 0
        for path in self.paths():
            height = _read(path, columns=["step"]).height
            if batch and rows + height > _MERGED_ROWS:
                _merge(batch)
                batch, rows = [], 0
            batch.append(path)
            rows += height
        _merge(batch)


def _latest(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.unique(_RECORD_KEY, keep="last", maintain_order=True)


def _row(row: Mapping[str, Any]) -> EpisodeRow:
    return EpisodeRow(episode_from_row(row), row["step"], row["label"], group=row["group"], member=row["member"])


def _merge(parts: Sequence[Path]) -> None:
    """Merges parts into the last of them, which keeps the order of records; a kill leaves only superseded records behind."""
    if len(parts) > 1:
        write_parquet(parts[-1], _latest(scan_rows(list(parts), EPISODE_SCHEMA).collect()))
        for path in parts[:-1]:
            path.unlink(missing_ok=True)


def _labels(path: Path) -> list[str]:
    return _read(path, columns=["label"])["label"].unique(maintain_order=True).to_list()


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Files with these names, sorted by number: 1,000,000 comes after 999,999."""
    if not folder.is_dir():
        return []
    named = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in named if name)


def _read(path: Path, *of: pl.Expr, columns: Sequence[str] = EPISODE_SCHEMA.names()) -> pl.DataFrame:
    """The rows of a file of episodes that fulfil conditions."""
    try:
        return scan_rows([_whole(path)], EPISODE_SCHEMA).filter(pl.lit(True), *of).select(columns).collect()
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, f"is not a run record: {type(error).__name__}: {error}") from error


def _metrics(step: int, path: Path) -> pl.DataFrame:
    """The row of a step, cast to this version's types."""
    try:
        row = read_parquet(_whole(path)).cast(pl.Float64).cast({"step": pl.Int64})
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, f"is not a run record: {type(error).__name__}: {error}") from error
    if row["step"].to_list() != [step]:
        raise _damaged(path, "has no row for this step")
    return row


def _whole(path: Path) -> Path:
    if not is_whole(path):
        raise _damaged(path, f"is not a complete Parquet file ({path.stat().st_size:,} bytes)")
    return path


def _damaged(path: Path, problem: str) -> RunFolderError:
    return RunFolderError(
        f"{path} cannot be read: it {problem}. The file is damaged (power loss, interrupted copy) or not from this run. Move it "
        "away to read the others; the run's resume point does not need it."
    )


def _write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, frame)

"""A run folder's records as Parquet files.

::

    <folder>/episodes/step-000012.parquet      one row per episode of the step (:data:`.rows.EPISODE_SCHEMA`)
    <folder>/groups/step-000012.parquet        one row per group, dropped ones included (:data:`.rows.GROUP_SCHEMA`)
    <folder>/metrics/step-000012.parquet       one row: the step's metrics
    <folder>/evaluations/000-untrained.parquet one row per episode of an evaluation; files are numbered in order

Files are written atomically (:func:`~searchr1_async.boundary.paths.write_parquet`), metrics last: a step with metrics is complete. All
methods block on disk I/O: call them from a worker thread. Readers raise :class:`RunFolderError`, naming the file, for one that
is empty, truncated or of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from searchr1_async.boundary.paths import remove_leftovers, write_parquet
from searchr1_async.boundary.tables import is_whole, read_parquet, scan_parquet, scan_rows
from searchr1_async.episodes.table import (
    EPISODE_SCHEMA,
    GROUP_SCHEMA,
    Advantages,
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
_EVALUATION_FILE = re.compile(r"(\d{3,})-.*\.parquet")


class RunRecords:
    """Reads and writes the records below ``folder``; subfolders are created on first write.

    Reading while a run writes is safe. Only one writer is allowed; the run's lock ensures it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._episodes = self.folder / "episodes"
        self._groups = self.folder / "groups"
        self._metrics = self.folder / "metrics"
        self._evaluations = self.folder / "evaluations"

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
        for path in self._evaluation_files():
            with _reading(path):
                last = read_parquet(path, columns=["step"])["step"].max()
            if isinstance(last, int) and last > step:
                path.unlink(missing_ok=True)
        for folder in (self._metrics, self._groups, self._episodes, self._evaluations):
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
        path = self._evaluation_file(label)
        if path is None:
            taken = [
                int(name[1]) for file in self._evaluation_files() if (name := _EVALUATION_FILE.fullmatch(file.name))
            ]
            slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "evaluation"
            path = self._evaluations / f"{max(taken, default=-1) + 1:03d}-{slug}.parquet"
        # The label is stored in the rows: without episodes there is nothing to record.
        if episodes:
            _write(episodes_frame(evaluation_rows(label, episodes, step)), path)

    def evaluations(self) -> pl.LazyFrame:
        """The episodes of all evaluations in order, distinguished by ``label``."""
        return scan_rows(list(map(_whole, self._evaluation_files())), EPISODE_SCHEMA)

    def load_evaluation(self, label: str) -> tuple[Episode, ...]:
        """The episodes of one evaluation; empty if the label is unknown."""
        path = self._evaluation_file(label)
        return _load(path) if path is not None else ()

    def evaluation_labels(self) -> tuple[str, ...]:
        """The labels of the evaluations, in order."""
        return tuple(_label(path) for path in self._evaluation_files())

    def _evaluation_files(self) -> Iterator[Path]:
        if self._evaluations.is_dir():
            named = ((_EVALUATION_FILE.fullmatch(path.name), path) for path in self._evaluations.iterdir())
            yield from (path for _, path in sorted((int(name[1]), path) for name, path in named if name))

    def _evaluation_file(self, label: str) -> Path | None:
        wanted = storable(label)
        return next((path for path in self._evaluation_files() if _label(path) == wanted), None)


def _step_file(step: int) -> str:
    return f"step-{step:06d}.parquet"


def _step_files(folder: Path) -> list[tuple[int, Path]]:
    """Sorted by step number: 1,000,000 comes after 999,999."""
    if not folder.is_dir():
        return []
    named = ((_STEP_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in named if name)


def _label(path: Path) -> str:
    with _reading(path):
        return read_parquet(path, columns=["label"], n_rows=1)["label"][0]


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

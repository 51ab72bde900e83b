"""A run's folder as data: what was played and measured, in Parquet files that any reader can scan.

::

    <folder>/episodes/step-000012.parquet      one row for each episode of the step (:data:`.rows.EPISODE_SCHEMA`)
    <folder>/groups/step-000012.parquet        one row for each of its groups, dropped ones too (:data:`.rows.GROUP_SCHEMA`)
    <folder>/metrics/step-000012.parquet       one row: the step's metrics
    <folder>/evaluations/000-untrained.parquet one row for each episode of an evaluation, in the order they were made

Each file appears whole or not at all (:func:`~searchr1_async.files.write_parquet`). A step's metrics are written
last, so a step that has metrics has everything. All methods are synchronous and touch the disk: call them
from a worker thread.

A file that is empty, torn (after a power cut) or of another kind is refused by its name, with :class:`RunFolderError`, by
whatever reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from searchr1_async.boundary.tables import is_whole, read_parquet, scan_parquet, scan_rows
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import RunFolderError
from searchr1_async.files import remove_leftovers, write_parquet
from searchr1_async.watch.rows import (
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

__all__ = ["GroupOutcome", "RunRecords"]

_METRICS = pl.Schema({"step": pl.Int64})
_STEP_FILE = re.compile(r"step-(\d{6,})\.parquet")
_EVALUATION_FILE = re.compile(r"(\d{3,})-.*\.parquet")


class RunRecords:
    """Writes and reads the records below ``folder``; folders are made when the first file is written.

    Opening it for reading while a run writes there is safe. Two writers at once are not: the run's lock sees to that.
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
        """Record one finished step; written again, it replaces the earlier record.

        Args:
            step: optimiser steps finished, this one included (from 1).
            outcomes: of every group of the step, those dropped too, even without any episode.
            metrics: name to number; a value that is no number raises before anything is written.
            advantages: of a group's rewards, as they were learned from.

        Raises:
            OSError: the folder cannot be written.
        """
        numbers = {storable(name): float(value) for name, value in metrics.items() if name != "step"}
        row = pl.DataFrame({"step": [step], **{name: [value] for name, value in numbers.items()}})
        _write(episodes_frame(step_rows(step, outcomes, advantages)), self._episodes / _step_file(step))
        _write(groups_frame(step, outcomes), self._groups / _step_file(step))
        _write(row.cast({"step": pl.Int64}), self._metrics / _step_file(step))

    def truncate_after(self, step: int) -> None:
        """Remove what was recorded after ``step`` (evaluations too): a resumed run plays those steps again."""
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
        """One row for each finished step, in order; metrics that a step lacks are null. No steps: no rows.

        Raises:
            RunFolderError: a file of them is damaged.
        """
        return pl.concat([pl.DataFrame(schema=_METRICS), *map(_metrics, _step_files(self._metrics))], how="diagonal")

    def episodes(self) -> pl.LazyFrame:
        """Every episode of training, by step, group and member; an empty frame of the same schema if there is none."""
        return scan_rows([_whole(path) for _, path in _step_files(self._episodes)], EPISODE_SCHEMA)

    def groups(self) -> pl.LazyFrame:
        """Every group of training, trained on or dropped, by step; an empty frame of the same schema if there is none."""
        return scan_rows([_whole(path) for _, path in _step_files(self._groups)], GROUP_SCHEMA)

    def load_episodes(self, step: int) -> tuple[Episode, ...]:
        """The episodes of one step as values again; empty when the step was not recorded."""
        path = self._episodes / _step_file(step)
        return _load(path) if path.exists() else ()

    def load_episode(self, step: int, group: int, member: int) -> Episode | None:
        """One episode of training as a value again; None where there is none."""
        path = self._episodes / _step_file(step)
        if not path.exists():
            return None
        with _reading(path):
            rows = scan_parquet(path).filter(group=group, member=member).collect()
            return episode_from_row(rows.row(0, named=True)) if rows.height else None

    def write_evaluation(self, label: str, episodes: Sequence[Episode], step: int | None = None) -> None:
        """Record one evaluation; the same ``label`` again replaces the earlier one, in its place.

        Args:
            label: its name (``untrained``, ``after RL``).
            episodes: in any order, failed ones too.
            step: optimiser steps done when it was made; None when it belongs to no step.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self._evaluation_file(label)
        if path is None:
            taken = [
                int(name[1]) for file in self._evaluation_files() if (name := _EVALUATION_FILE.fullmatch(file.name))
            ]
            slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "evaluation"
            path = self._evaluations / f"{max(taken, default=-1) + 1:03d}-{slug}.parquet"
        # An evaluation of no episodes has no row to hold its label; it is not recorded.
        if episodes:
            _write(episodes_frame(evaluation_rows(label, episodes, step)), path)

    def evaluations(self) -> pl.LazyFrame:
        """The episodes of every evaluation, in the order they were made, told apart by ``label``."""
        return scan_rows(list(map(_whole, self._evaluation_files())), EPISODE_SCHEMA)

    def load_evaluation(self, label: str) -> tuple[Episode, ...]:
        """The episodes of one evaluation as values again; empty when there is none of that label."""
        path = self._evaluation_file(label)
        return _load(path) if path is not None else ()

    def evaluation_labels(self) -> tuple[str, ...]:
        """The labels of the evaluations, in the order they were made."""
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
    """By step, not by name: step 1,000,000 comes after step 999,999."""
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
    """The row of a step; numbers of other types than ours are taken as ours."""
    step, path = file
    with _reading(path):
        row = read_parquet(path)
        if row["step"].to_list() != [step]:
            raise _damaged(path, "holds no row of this step")
        return row.cast({name: _METRICS.get(name, pl.Float64()) for name in row.columns})


def _whole(path: Path) -> Path:
    """The path of a file that can be scanned."""
    if not is_whole(path):
        raise _damaged(path, f"is no whole Parquet file ({path.stat().st_size:,} bytes)")
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is wrong with a file is said with its name, and what to do."""
    _whole(path)
    try:
        yield
    except (pl.exceptions.PolarsError, IndexError, KeyError, TypeError) as error:
        raise _damaged(path, f"is no record of a run: {type(error).__name__}: {error}") from error


def _damaged(path: Path, problem: str) -> RunFolderError:
    return RunFolderError(
        f"{path} cannot be read: it {problem}. It was damaged (a power cut, a copy that was cut short), or is not of this run. Move it "
        "away to read the others; the run's resume point does not need it."
    )


def _write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, frame)

"""An evaluation's folder: every episode on disk soon after it has ended, so that a kill costs only those under way.

::

    <folder>/manifest.json          what is measured (:mod:`.manifest`)
    <folder>/questions.parquet      the questions, suite after suite
    <folder>/episodes/000012.parquet   episodes in the order in which they ended (:data:`~searchr1_async.watch.rows.EPISODE_SCHEMA`:
                                    ``label`` is the system, ``group`` the question's place, ``member`` the sample)
    <folder>/judgements.parquet     the judge's verdicts, where there is one

Each file appears whole or not at all. Of two records of one sample the later counts, so an episode that a service failed may
be played again. Methods that touch the disk are synchronous: call them in a worker thread.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from searchr1_async.boundary.tables import read_parquet, scan_rows
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.scores import SCORE_SCHEMA, score_frame
from searchr1_async.files import remove_leftovers, write_parquet
from searchr1_async.watch.rows import EPISODE_SCHEMA, EpisodeRow, episode_from_row, episodes_frame

_PART = re.compile(r"(\d{6,})\.parquet")
JUDGEMENTS_NAME = "judgements.parquet"
_KEY = ["system", "place", "sample"]
_RECORD_KEY = ["label", "group", "member"]
"""The same in the files."""
_JUDGEMENTS = pl.Schema({"system": pl.String, "place": pl.Int64, "sample": pl.Int64, "judged": pl.Float64})
_MERGED_ROWS = 1024
"""Episodes a file at the end, where an evaluation of an hour had written thousands of small ones. Merging holds as many: long
ones took 280 MB for a file of 19 MB, and 320 MB for four of them."""

SampleKey = tuple[str, int, int]
"""System, the question's place among all that are asked, and the sample's number."""
PlayedSample = tuple[SampleKey, int | None, Episode]
"""A sample, the optimiser steps done before the weights that played it, and its episode."""


class EpisodeStore:
    """The episodes of one evaluation, on disk, and their scores in memory.

    Args:
        folder: the evaluation's; None is one of its own that goes with this object.
    """

    def __init__(self, folder: Path | None) -> None:
        self.is_kept = folder is not None
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="searchr1-evaluation-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self._episodes = folder / "episodes"
        self._lock = threading.Lock()
        self._next = 1
        self._scores: list[pl.DataFrame] = []
        self._judgements = pl.DataFrame(schema=_JUDGEMENTS)

    # --- writing ------------------------------------------------------------------------------------------------------

    def load(self) -> set[SampleKey]:
        """What an earlier session left: the samples that need not be played again. Call it before :meth:`write`.

        Raises:
            RunFolderError: a file cannot be read.
        """
        with self._lock, _reading(self.folder):
            parts = self._parts()
            self._next = max((number for number, _ in parts), default=0) + 1
            remove_leftovers(self._episodes)
            self._scores = [_scores_of(read_parquet(path)) for _, path in parts]
            if (path := self.folder / JUDGEMENTS_NAME).exists():
                self._judgements = read_parquet(path)
        scores = self._latest()
        rows = scores.filter(~pl.col("failed")).select(_KEY).iter_rows()
        return {(system, place, sample) for system, place, sample in rows}

    def write(self, played: Sequence[PlayedSample]) -> None:
        """Records finished episodes, failed ones too.

        Raises:
            OSError: the folder cannot be written.
        """
        if not played:
            return
        rows = [
            EpisodeRow(episode, step, label, group=place, member=sample, trained=False)
            for (label, place, sample), step, episode in played
        ]
        with self._lock:
            self._episodes.mkdir(parents=True, exist_ok=True)
            write_parquet(self._episodes / f"{self._next:06d}.parquet", episodes_frame(rows))
            self._next += 1
            self._scores.append(_scored(played))

    def finish(self) -> None:
        """Merges the many files into few, each sample once; a kill meanwhile loses nothing.

        Files that are full already are left as they are, and no more than one such file's episodes are held at once.

        Raises:
            OSError: the folder cannot be written.
            RunFolderError: a file cannot be read.
        """
        with self._lock, _reading(self.folder):
            parts = _read_parts([path for _, path in self._parts()])
            for part in parts:
                if part.latest.is_empty():  # later files hold all that is in it
                    part.path.unlink(missing_ok=True)
            for batch in _batches([part for part in parts if not part.latest.is_empty()]):
                _merge(batch)

    # --- reading ------------------------------------------------------------------------------------------------------

    def scores(self) -> pl.DataFrame:
        """A row a sample, by system, question and sample: the columns of ``SCORE_SCHEMA``, and ``place``."""
        with self._lock:
            judgements, latest = self._judgements, self._latest()
        return (
            latest.drop("judged")
            .join(judgements, on=_KEY, how="left")
            .select(*SCORE_SCHEMA, "place")
            .sort("system", "place", "sample")
        )

    def unjudged(self, systems: Sequence[str] | None = None) -> pl.DataFrame:
        """The finished samples that no judge was asked about, of all systems or of these."""
        with self._lock:
            left = self._latest().filter(~pl.col("failed")).join(self._judgements, on=_KEY, how="anti")
        return left if systems is None else left.filter(pl.col("system").is_in(list(systems)))

    def write_judgements(self, verdicts: Mapping[SampleKey, float | None]) -> None:
        """Keeps a judge's verdicts: 1 right, 0 wrong, None where it gave none.

        Raises:
            OSError: the folder cannot be written.
        """
        rows = [(*key, verdict) for key, verdict in verdicts.items()]
        with self._lock:
            self._judgements = pl.concat([self._judgements, pl.DataFrame(rows, schema=_JUDGEMENTS, orient="row")])
            write_parquet(self.folder / JUDGEMENTS_NAME, self._judgements)

    def episodes(self, system: str) -> tuple[Episode, ...]:
        """A system's episodes in the order of the questions.

        Raises:
            RunFolderError: they cannot be read.
        """
        with self._lock, _reading(self.folder):
            frame = self.frame().filter(label=system).collect()
        frame = _each_once(frame).sort("group", "member")
        return tuple(episode_from_row(row) for row in frame.iter_rows(named=True))

    def frame(self) -> pl.LazyFrame:
        """Every record of an episode, scanned from the files."""
        return scan_rows([path for _, path in self._parts()], EPISODE_SCHEMA)

    def _latest(self) -> pl.DataFrame:
        empty = pl.DataFrame(schema={**SCORE_SCHEMA, "place": pl.Int64})
        return pl.concat([empty, *self._scores]).unique(_KEY, keep="last", maintain_order=True)

    def _parts(self) -> list[tuple[int, Path]]:
        if not self._episodes.is_dir():
            return []
        named = ((_PART.fullmatch(path.name), path) for path in self._episodes.iterdir())
        return sorted((int(name[1]), path) for name, path in named if name)


@dataclass(frozen=True, slots=True)
class _Part:
    """A file of episodes."""

    path: Path
    rows: int
    latest: pl.Series
    """Numbers of its rows of which no later row, in it or in a later file, is a record of the same sample."""

    @property
    def is_each_once(self) -> bool:
        return len(self.latest) == self.rows


def _read_parts(paths: Sequence[Path]) -> list[_Part]:
    """Reads the key columns alone."""
    frames = [read_parquet(path, columns=_RECORD_KEY) for path in paths]
    numbered = [
        frame.with_row_index("row").with_columns(pl.lit(number, pl.UInt32).alias("part"))
        for number, frame in enumerate(frames)
    ]
    latest = _each_once(pl.concat(numbered)).partition_by("part", as_dict=True) if numbered else {}
    none = pl.Series("row", dtype=pl.UInt32)
    return [
        _Part(path, frame.height, latest[number,]["row"] if (number,) in latest else none)
        for number, (path, frame) in enumerate(zip(paths, frames, strict=True))
    ]


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Neighbours that fit into one file together, in their order; cut again after they were merged, they are one a batch."""
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
    """Makes one file of several, each sample once.

    It takes the place of the last: later than all that the others held, and no later than what came after them. They go when
    it is there, so that of a kill between nothing stays but earlier records of the same samples.
    """
    *earlier, last = batch
    if not earlier and last.is_each_once:
        return
    frames = [scan_rows([part.path], EPISODE_SCHEMA).collect()[part.latest] for part in batch]
    write_parquet(last.path, pl.concat(frames))
    for part in earlier:
        part.path.unlink(missing_ok=True)


def _each_once(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.unique(_RECORD_KEY, keep="last", maintain_order=True)


def _scored(played: Sequence[PlayedSample]) -> pl.DataFrame:
    """Scores of episodes, by system, each with its question's place."""
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
    """A file that cannot be read becomes an error that names the folder."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise RunFolderError(f"an episode file in {folder} cannot be read: {error}") from error

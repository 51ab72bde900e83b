"""An evaluation's folder. Episodes are written soon after they end, so a kill loses only those in flight.

::

    <folder>/manifest.json             what is measured (:mod:`.manifest`)
    <folder>/questions.parquet         the questions, suite after suite
    <folder>/episodes/000012.parquet   episodes in completion order (:class:`~searchr1_async.records.run_records.EvaluationParts`)
    <folder>/judgements-….parquet      the verdicts of a judge, if any

Methods that touch the disk block: call them in a worker thread.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import anyio
import polars as pl

from searchr1_async.boundary.paths import remove_leftovers, write_parquet
from searchr1_async.boundary.tables import read_parquet
from searchr1_async.boundary.waits import GatheredItems
from searchr1_async.episodes.table import EpisodeRow, metadata_json, storable
from searchr1_async.episodes.types import Episode, Question
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import EvaluationParts
from searchr1_async.records.scores import SCORE_SCHEMA, score_row
from searchr1_async.runs.folder import writing_records

OLD_VERDICTS_NAME = "judgements.parquet"
"""Of older versions, for the judge of the manifest."""
_KEY = ["system", "place", "sample"]
_JUDGEMENTS = pl.Schema({"system": pl.String, "place": pl.Int64, "sample": pl.Int64, "judged": pl.Float64})
SampleKey = tuple[str, int, int]
"""System, index of the question, sample number."""
EpisodeKey = tuple[str, str, str, int]
"""System, suite, question id, sample number."""
_EPISODE_KEY = pl.Schema({"label": pl.String, "data_source": pl.String, "question_id": pl.String, "member": pl.Int64})
Item = TypeVar("Item")

_WRITE_INTERVAL = 1.0
"""Seconds between coalesced writes; a kill loses at most this much beside episodes in flight. Shorter costs more CPU."""


class EpisodeStore:
    """Episodes of one evaluation on disk, and their scores in memory.

    Args:
        folder: None uses a temporary folder that is deleted with this object.
        verdicts: name of the file with the judge's verdicts; None without a judge.
    """

    def __init__(self, folder: Path | None, verdicts: str | None = None) -> None:
        self.is_kept = folder is not None
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="searchr1-evaluation-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self._verdicts = verdicts
        self._parts = EvaluationParts(folder / "episodes")
        self._lock = threading.Lock()
        self._scores = [_scored([])]
        self._judgements = pl.DataFrame(schema=_JUDGEMENTS)

    # --- writing ------------------------------------------------------------------------------------------------------

    def load(self) -> set[SampleKey]:
        """Loads an earlier session; returns its finished samples. Call it before :meth:`write`. Raises RunFolderError."""
        with self._lock:
            remove_leftovers(self._parts.folder)
            self._scores += map(_scored, self._parts.read())
            for name in filter(None, (self._verdicts, self._verdicts and OLD_VERDICTS_NAME)):
                if (self.folder / name).exists():
                    self._judgements = _table(self.folder / name)
        return set(self._latest().filter(~pl.col("failed")).select(_KEY).iter_rows())

    def write(self, rows: Sequence[EpisodeRow]) -> None:
        """Writes finished episodes, failed ones included. Raises OSError if the folder cannot be written."""
        if rows:
            with self._lock:
                self._parts.write(rows)
                self._scores.append(_scored(rows))

    def gathered(self, write: Callable[[list[Item]], None]) -> GatheredItems[Item]:
        """Gathers items and writes them in a worker thread; its ``writing`` raises CheckpointError in an exception group."""

        async def put(items: list[Item]) -> None:
            with writing_records(self.folder):
                await anyio.to_thread.run_sync(write, items)

        return GatheredItems(put, _WRITE_INTERVAL)

    def finish(self) -> None:
        """Merges small files; safe against a kill. Raises OSError or RunFolderError."""
        with self._lock:
            self._parts.merge()

    def write_judgements(self, verdicts: Sequence[tuple[str, int, int, float | None]]) -> None:
        """Adds verdicts after their sample: 1 right, 0 wrong, None unreadable. Raises OSError if the folder cannot be written."""
        assert self._verdicts is not None
        with self._lock:
            new = pl.DataFrame(verdicts, schema=_JUDGEMENTS, orient="row")
            self._judgements = pl.concat([self._judgements, new])
            write_parquet(self.folder / self._verdicts, self._judgements)

    # --- reading ------------------------------------------------------------------------------------------------------

    def scores(self) -> pl.DataFrame:
        """One row per sample, sorted by system, question and sample: ``SCORE_SCHEMA`` plus ``place``."""
        with self._lock:
            found = self._latest().drop("judged").join(self._judgements, on=_KEY, how="left")
        return found.select(*SCORE_SCHEMA, "place").sort(_KEY)

    def unjudged(self, systems: Sequence[str] | None = None) -> pl.DataFrame:
        """Scores of finished samples without a verdict, of all systems or the given ones."""
        with self._lock:
            left = self._latest().filter(~pl.col("failed")).join(self._judgements, on=_KEY, how="anti")
        return left if systems is None else left.filter(pl.col("system").is_in(list(systems)))

    def episodes(self, system: str) -> tuple[Episode, ...]:
        """A system's episodes in question order. Raises RunFolderError if a file cannot be read."""
        with self._lock:
            return tuple(row.episode for row in self._parts.latest(pl.col("label") == system))

    def rows(self, keys: Collection[EpisodeKey]) -> list[EpisodeRow]:
        """The episodes with these keys, by system, in question order. Raises RunFolderError."""
        wanted = pl.DataFrame(list(keys), schema=_EPISODE_KEY, orient="row")
        with self._lock:
            return self._parts.latest(pl.col("question_id").is_in(wanted["question_id"].to_list()), keys=wanted)

    def frame(self) -> pl.LazyFrame:
        """All records in the order they were written, superseded ones included."""
        return self._parts.frame()

    def _latest(self) -> pl.DataFrame:
        return pl.concat(self._scores).unique(_KEY, keep="last", maintain_order=True)


def _scored(rows: Sequence[EpisodeRow]) -> pl.DataFrame:
    scores = [score_row(row.label or "", row.member or 0, row.episode, row.step) | {"place": row.group} for row in rows]
    return pl.DataFrame(scores, schema={**SCORE_SCHEMA, "place": pl.Int64}, strict=False)


def _table(path: Path) -> pl.DataFrame:
    """A file of the folder. Raises RunFolderError if it is missing or cannot be read."""
    try:
        return read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunFolderError(f"{path}, a file of an evaluation, cannot be read: {error}") from error


# --- the questions ------------------------------------------------------------------------------------------------------

QUESTIONS_NAME = "questions.parquet"
_SCHEMA = {"suite": pl.String, "id": pl.String, "question": pl.String, "golden_answers": pl.List(pl.String)}
_SCHEMA |= {"metadata": pl.String}  # JSON


def questions_frame(questions: Sequence[Question]) -> pl.DataFrame:
    """Questions as a table; lone surrogates become U+FFFD."""
    rows = [
        (
            *map(storable, (question.data_source, question.id, question.question)),
            list(map(storable, question.golden_answers)),
            metadata_json(question.metadata),
        )
        for question in questions
    ]
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def questions_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of a questions table, independent of the machine."""
    digest = hashlib.sha256()
    for row in frame.iter_rows():
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def read_questions(folder: Path) -> pl.DataFrame:
    """Reads the questions in an evaluation's folder. Raises RunFolderError if they are missing or cannot be read."""
    return _table(folder / QUESTIONS_NAME)


def questions_of(frame: pl.DataFrame) -> tuple[Question, ...]:
    """The questions of a table."""
    return tuple(
        Question(identifier, text, tuple(golden), suite, json.loads(metadata))
        for suite, identifier, text, golden, metadata in frame.iter_rows()
    )

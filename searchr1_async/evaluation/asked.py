"""The questions of an evaluation in a fixed order, stored as a table beside the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from searchr1_async.boundary.tables import read_parquet
from searchr1_async.data.suites import Suite
from searchr1_async.episodes.table import metadata_json, storable
from searchr1_async.episodes.types import Question
from searchr1_async.errors import RunFolderError

QUESTIONS_NAME = "questions.parquet"
_SCHEMA = pl.Schema(
    {
        "suite": pl.String,
        "id": pl.String,
        "question": pl.String,
        "golden_answers": pl.List(pl.String),
        "metadata": pl.String,  # JSON
    }
)


def asked_questions(suites: Sequence[Suite]) -> tuple[Question, ...]:
    """All questions, suite after suite; a question's index here identifies it everywhere."""
    return tuple(question for suite in suites for question in suite.questions)


def interleaved(suites: Sequence[Suite]) -> list[int]:
    """Question indices in rollout order, with each suite spread evenly over the whole.

    Every suite then has running scores from the start, and no suite's slowest questions pile up at the end.
    """
    first = 0
    places: list[tuple[float, int]] = []
    for suite in suites:
        count = len(suite.questions)
        places += [((number + 0.5) / count, first + number) for number in range(count)]
        first += count
    return [place for _, place in sorted(places)]


def questions_frame(questions: Sequence[Question]) -> pl.DataFrame:
    """Questions as a table; lone surrogates become U+FFFD."""
    return pl.DataFrame(
        {
            "suite": [storable(question.data_source) for question in questions],
            "id": [storable(question.id) for question in questions],
            "question": [storable(question.question) for question in questions],
            "golden_answers": [list(map(storable, question.golden_answers)) for question in questions],
            "metadata": [metadata_json(question.metadata) for question in questions],
        },
        schema=_SCHEMA,
    )


def questions_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of a questions table, independent of the machine."""
    digest = hashlib.sha256()
    for row in frame.iter_rows():
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def read_questions(folder: Path) -> pl.DataFrame:
    """Reads the questions in an evaluation's folder. Raises RunFolderError if they are missing or cannot be read."""
    path = folder / QUESTIONS_NAME
    try:
        return read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunFolderError(f"the evaluation's questions cannot be read from {path}: {error}") from error


def questions_of(frame: pl.DataFrame) -> dict[str, tuple[Question, ...]]:
    out: dict[str, list[Question]] = {}
    for suite, identifier, text, golden, metadata in frame.iter_rows():
        question = Question(identifier, text, tuple(golden), suite, json.loads(metadata))
        out.setdefault(suite, []).append(question)
    return {suite: tuple(questions) for suite, questions in out.items()}

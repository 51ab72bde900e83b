"""The manifest of an evaluation: everything needed to repeat it, as one JSON file.

The questions of an evaluation in a fixed order, stored as a table beside the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.boundary.tables import read_parquet
from searchr1_async.data.suites import Suite
from searchr1_async.episodes.table import metadata_json, storable
from searchr1_async.episodes.types import Question
from searchr1_async.errors import RunFolderError
from searchr1_async.runs.folder import MANIFEST_NAME

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SuiteRecord:
    """A suite and its selected questions."""

    name: str
    source: str
    """Origin: a hub data set with its commit, a file, ``atlas``, ``memory``."""
    sha256: str | None
    """Digest of the source file; None for questions given in memory."""
    total: int
    split: str | None
    limit: int | None
    seed: int | None
    question_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SystemRecord:
    """An evaluated system: weights and how they were used."""

    label: str
    method: str
    """``search``, ``direct``, ``rag`` or ``recipe``."""
    model: str
    checkpoint: str | None = None
    """``tinker://`` path of the weights; None is the base model."""
    step: int | None = None
    run: str | None = None
    service_folder: str | None = None
    """Folder of the embedded service with the weights, if given."""
    format: str = "hermes"
    renderer: str | None = None
    thinking: bool | str | None = None
    """If different from the evaluation's, for example from the run's training."""
    instructions: str | None = None
    """None is the method's own prompt."""
    prompt: str | None = None
    prompt_sha256: str | None = None
    """Digest of the prompt with the tool's description or the worked examples."""
    limits: Mapping[str, Any] | None = None
    """Fields of ``EpisodeLimits``, if different from the evaluation's."""
    n_results: int | None = None
    """Passages per query, if different from the search's."""
    max_passage_words: int | None = None
    """Words per passage, if different from the search's; 0 is no limit."""
    like: str | None = None
    """Folder of the run whose training settings it uses; None if none, or if an older version wrote the manifest."""
    differences: Mapping[str, Any] | None = None
    """Settings that differ from training: name to [value in training, value here]."""
    unrecorded: tuple[str, ...] = ()
    """Settings missing in the run's folder, replaced by defaults."""
    overlap: Mapping[str, int] | None = None
    """Per suite, the number of questions seen in training; None if the training questions are unknown."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of one evaluation."""

    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    service: Mapping[str, Any]
    """``embedded``, ``tinker`` (Tinker's cloud), and ``host`` if an address was given."""
    search: Mapping[str, Any] | None
    """``fingerprint``, ``embedder``, ``source``, ``n_results``, ``max_passage_words``; None if no system searched."""
    settings: Mapping[str, Any]
    """``samples``, ``temperature``, ``seed``, ``max_turns``, ``max_tokens``, …"""
    suites: tuple[SuiteRecord, ...]
    systems: tuple[SystemRecord, ...]
    questions_sha256: str
    """Digest of ``questions.parquet``'s content."""
    judge: Mapping[str, Any] | None = None
    """Fields of ``Judge`` with the resolved model."""
    notes: tuple[str, ...] = field(default=())
    """Package versions that changed between sessions."""

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically. Raises OSError if the folder cannot be written."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        write_atomically(folder / MANIFEST_NAME, text.encode("utf-8", "replace"))

    @classmethod
    def load(cls, path: str | Path) -> Manifest | None:
        """Loads a manifest from a folder or file; None if there is none. Raises RunFolderError."""
        path = absolute_path(path)
        path = path / MANIFEST_NAME if path.is_dir() else path
        try:
            values = json.loads(path.read_bytes())
            if (written := values.pop("format")) != _FORMAT:
                raise RunFolderError(f"{path} has format {written}; this version of the package reads {_FORMAT}")
            unknown = set(values) - {each.name for each in fields(cls)}
            if unknown:
                raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
            suites = tuple(SuiteRecord(**{**s, "question_ids": tuple(s["question_ids"])}) for s in values.pop("suites"))
            systems = tuple(
                SystemRecord(**{**s, "unrecorded": tuple(s.get("unrecorded", ()))}) for s in values.pop("systems")
            )
            return cls(**{**values, "suites": suites, "systems": systems, "notes": tuple(values.get("notes", ()))})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunFolderError(f"{path} is not an evaluation manifest: {error}") from error


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

"""The manifest of an evaluation: everything needed to repeat it, as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.errors import RunFolderError

MANIFEST_NAME = "manifest.json"
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

"""What an evaluation was: everything that another person needs to repeat it or to judge it, as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.errors import RunFolderError
from searchr1_async.files import write_atomically

MANIFEST_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SuiteRecord:
    """A suite, and which of its questions were asked."""

    name: str
    source: str
    """Where it came from: a hub data set with its commit, a file, ``atlas``, ``memory``."""
    sha256: str | None
    """Of that file; None of questions that came from memory."""
    total: int
    """Questions that the source has."""
    split: str | None
    limit: int | None
    seed: int | None
    question_ids: tuple[str, ...]
    """Those asked, in their order."""


@dataclass(frozen=True, slots=True)
class SystemRecord:
    """What was measured: weights, and the way they were used."""

    label: str
    method: str
    """``search``, ``direct``, ``rag`` or ``recipe``."""
    model: str
    """The base model, as the service calls it."""
    checkpoint: str | None = None
    """``tinker://`` path of its weights; None is the base model."""
    step: int | None = None
    """Optimiser steps done before these weights."""
    run: str | None = None
    """The folder of the run that they come from."""
    service_folder: str | None = None
    """Of the embedded service that holds them, where it was named."""
    format: str = "hermes"
    renderer: str | None = None
    thinking: bool | str | None = None
    """Where it is another than the evaluation's, such as that which a run was trained with."""
    instructions: str | None = None
    """None: the method's own."""
    prompt: str | None = None
    """The system prompt that was used, written out."""
    prompt_sha256: str | None = None
    """Of it with all that every question is asked with: the tool's description, the worked examples."""
    limits: Mapping[str, Any] | None = None
    """Where its episodes may become longer or shorter than the others'; fields of ``EpisodeLimits``."""
    n_results: int | None = None
    """Passages a query brings, where it is another number than the search's."""
    max_passage_words: int | None = None
    """Words after which a passage is cut, where these are others than the search's; 0 is never."""
    like: str | None = None
    """The folder of the run that it is played like; None: of none, or an earlier version of the package measured it."""
    differences: Mapping[str, Any] | None = None
    """Where it is played otherwise than it was trained: by setting, the value of the training and the one here."""
    unrecorded: tuple[str, ...] = ()
    """Settings that its run's folder does not hold; the defaults stand for them."""
    overlap: Mapping[str, int] | None = None
    """Questions of each suite that its training saw too; None: what it was trained on is not known."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One evaluation."""

    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    """Of the packages that matter, and of Python."""
    service: Mapping[str, Any]
    """``embedded``, ``tinker`` (its own cloud), and the ``host`` where an address was given."""
    search: Mapping[str, Any] | None
    """``fingerprint``, ``embedder``, ``source``, ``n_results``, ``max_passage_words``; None: nothing was searched for."""
    settings: Mapping[str, Any]
    """``samples``, ``temperature``, ``seed``, ``max_turns``, ``max_tokens``, …"""
    suites: tuple[SuiteRecord, ...]
    systems: tuple[SystemRecord, ...]
    questions_sha256: str
    """Of the questions themselves, which lie beside it."""
    judge: Mapping[str, Any] | None = None
    """Who judged, or judges: fields of ``Judge``, its model named."""
    notes: tuple[str, ...] = field(default=())
    """Versions of packages that changed from one session to the next."""

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json``, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        write_atomically(folder / MANIFEST_NAME, text.encode("utf-8", "replace"))

    @classmethod
    def load(cls, path: str | Path) -> Manifest | None:
        """The manifest in a folder, or in the file itself; None where there is none.

        Raises:
            RunFolderError: it cannot be read, or another version of the package wrote it.
        """
        path = absolute_path(path)
        path = path / MANIFEST_NAME if path.is_dir() else path
        try:
            values = json.loads(path.read_bytes())
            if (written := values.pop("format")) != _FORMAT:
                raise RunFolderError(f"{path} has format {written}, and this version of the package reads {_FORMAT}")
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
            raise RunFolderError(f"{path} is no evaluation's manifest: {error}") from error

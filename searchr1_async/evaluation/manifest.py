"""The manifest of an evaluation: what is measured and how, in one JSON file from which it is resumed, reported and repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.boundary.settings import settings_of
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.errors import RunFolderError
from searchr1_async.models import Thinking
from searchr1_async.runs.folder import MANIFEST_NAME
from searchr1_async.runs.weights import EpisodeChoice, Weights

_FORMAT = 1
_NOT_COMPARED = ("created", "versions", "notes", "judge")
"""Fields that may differ between sessions; a different judge only judges again."""


@dataclass(frozen=True, slots=True)
class SystemRecord:
    """An evaluated system: weights and how they are used. Settings at None are those of the evaluation, or of its search."""

    label: str
    method: Method
    model: str
    checkpoint: str | None = None
    """``tinker://`` path of the weights; None is the base model."""
    step: int | None = None
    run: str | None = None
    service_folder: str | None = None
    """Folder of the embedded service with the weights, if given."""
    format: str = "hermes"
    renderer: str | None = None
    thinking: Thinking = None
    instructions: str | None = None
    """None is the method's own prompt."""
    prompt: str | None = None
    prompt_sha256: str | None = None
    """Digest of the prompt with the tool's description or the worked examples."""
    limits: Mapping[str, Any] | None = None
    """Fields of ``EpisodeLimits``."""
    n_results: int | None = None
    max_passage_words: int | None = None
    """0 is no limit."""
    like: str | None = None
    """Folder of the run whose training settings it uses; None if none."""
    differences: Mapping[str, Any] | None = None
    """Settings that differ from training: name to [value in training, value here]."""
    unrecorded: tuple[str, ...] = ()
    """Settings missing in the run's folder, replaced by defaults."""
    overlap: Mapping[str, int] | None = None
    """Per suite, the number of questions seen in training; None if the training questions are unknown."""

    @property
    def folder(self) -> Path | None:
        """Folder of the embedded service with the weights: as given, else that of the run."""
        if self.service_folder is not None or self.run is None:
            return None if self.service_folder is None else Path(self.service_folder)
        inside = Path(self.run, "service")
        return inside if inside.is_dir() else None

    @property
    def weights(self) -> Weights:
        return Weights(self.checkpoint, self.step, service_folder=self.folder)

    def episodes(self, usual: EpisodeChoice) -> EpisodeChoice:
        """Its episode settings.

        Args:
            usual: those of the evaluation; its instructions are for the search tool, a baseline has its own.
        """
        own = settings_of(EpisodeChoice, asdict(self) | dict(self.limits or {}))
        return own.completed_by(usual if self.method == "search" else replace(usual, instructions=None))


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
class Manifest:
    """The manifest of one evaluation."""

    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    service: Mapping[str, Any]
    """``embedded``, ``tinker`` (Tinker's cloud), and ``host`` if an address was given."""
    search: Mapping[str, Any] | None
    """``fingerprint``, ``embedder``, ``source``, ``n_results``, ``max_passage_words``; None if no system searches."""
    settings: Mapping[str, Any]
    """``samples``, ``temperature``, ``seed``, ``format``, ``limits``, …"""
    suites: tuple[SuiteRecord, ...]
    systems: tuple[SystemRecord, ...]
    questions_sha256: str
    """Digest of ``questions.parquet``'s content."""
    judge: Mapping[str, Any] | None = None
    """Fields of ``Judge`` with the resolved model."""
    notes: tuple[str, ...] = ()
    """Package versions that changed between sessions."""
    format: int = _FORMAT

    @property
    def episodes(self) -> EpisodeChoice:
        """Settings of episodes that systems leave open."""
        # Older manifests lack thinking.
        return settings_of(EpisodeChoice, {"thinking": AS_TEMPLATE, **self.settings, **self.settings["limits"]})

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically. Raises OSError if the folder cannot be written."""
        text = json.dumps(msgspec.to_builtins(self), indent=1, ensure_ascii=False)
        write_atomically(folder / MANIFEST_NAME, text.encode("utf-8", "replace"))  # a prompt may have lone surrogates

    @classmethod
    def load(cls, path: str | Path) -> Manifest | None:
        """Loads a manifest from a folder or file; None if there is none. Raises RunFolderError."""
        path = absolute_path(path)
        path = path / MANIFEST_NAME if path.is_dir() else path
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error.strerror or error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RunFolderError(f"{path} is not an evaluation manifest: {error}") from error
        if manifest.format != _FORMAT:
            raise RunFolderError(f"{path} has format {manifest.format}; this version of the package reads {_FORMAT}")
        return manifest

    def continuing(self, then: Manifest) -> Manifest:
        """The original manifest with this session's judge, and a note on changed packages."""
        changes = [
            f"{name} {self.versions.get(name, 'missing')} after {then.versions.get(name, 'missing')}"
            for name in sorted({*then.versions, *self.versions})
            if then.versions.get(name) != self.versions.get(name)
        ]
        notes = [*then.notes, *([f"Resumed with other package versions: {', '.join(changes)}."] if changes else [])]
        return replace(then, judge=self.judge, notes=tuple(dict.fromkeys(notes)))


def refuse_changes(then: Manifest, now: Manifest, folder: Path | None, *, resume: bool) -> None:
    """Raises RunFolderError unless the evaluation in ``folder`` is this one and may be resumed; lists the changes."""
    if not resume:
        raise RunFolderError(
            f"{folder} already contains an evaluation: pass resume=True to continue it, or choose another out_dir"
        )
    before, after = (_compared(manifest) for manifest in (then, now))
    if changed := [name for name in before if before[name] != after[name]]:
        raise RunFolderError(
            f"{folder} contains a different evaluation ({', '.join(changed)} differ): choose another out_dir, or resume with "
            "the original arguments"
        )


def _compared(manifest: Manifest) -> dict[str, Any]:
    values = msgspec.to_builtins(manifest)
    # Older manifests had the first, and lack the second.
    values["settings"].pop("follows_runs", None)
    values["service"].pop("tinker", None)
    for system in values["systems"]:
        for name in ("overlap", "like", "differences"):
            del system[name]
    return {name: value for name, value in values.items() if name not in _NOT_COMPARED}

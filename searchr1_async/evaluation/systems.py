"""What is measured: weights, and a way to use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchr1_async.arguments import GivenWeights
from searchr1_async.boundary.paths import FilePath, is_same_place
from searchr1_async.boundary.settings import Count, Natural, check_settings
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.methods import Method
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.manifest import SystemRecord
from searchr1_async.models import Thinking
from searchr1_async.recorded import RecordedRun
from searchr1_async.run_folder import kept_search
from searchr1_async.search import Search
from searchr1_async.trained import EpisodeChoice, kept_record
from searchr1_async.watch.rows import storable
from searchr1_async.weights import Step, Weights, find_weights


@dataclass(frozen=True, slots=True)
class System:
    """Weights and a way to use them.

    ``System()`` is the base model with the search tool; ``System(method="direct")`` the same without one.

    Raises:
        ConfigurationError: an unknown method.
    """

    checkpoint: GivenWeights | RecordedRun | None = None
    """A run or its folder, a ``tinker://`` path; None is the base model."""
    step: Step = "last"
    """Of a run's kept weights: ``"last"``, ``"best"`` on its held-out questions, or after so many optimiser steps."""
    model: str | None = None
    """The base model; None is that of the run, or of the evaluation."""
    method: Method = "search"
    """``search``, or a baseline: ``direct`` (no search), ``rag`` (one search with the question itself), ``recipe`` (the
    ancestor's own prompt)."""
    format: str | None = None
    """Tool-call format; this and the following are None where they are the evaluation's, and where that says nothing either, as the
    run was trained."""
    renderer: str | None = None
    """Chat format."""
    thinking: Thinking = None
    """Whether the model thinks."""
    instructions: str | None = None
    """The system prompt; a baseline has its method's own."""
    limits: EpisodeLimits | None = None
    """How long its episodes may become. A prompt that asks for thoughts needs room for them."""
    n_results: Count | None = None
    """Passages a query brings; None is also as the search was made, where it was made with a number."""
    max_passage_words: Natural | None = None
    """Words after which a passage is cut, 0 for whole ones; None likewise."""
    service_folder: FilePath | None = None
    """The embedded service's folder that holds a ``tinker://`` checkpoint; a run knows its own."""

    def __post_init__(self) -> None:
        check_settings(self)


SystemSource = System | str | Path | RecordedRun | None
"""A system; a run or its folder, or a ``tinker://`` path, with the search tool; None is the base model."""


@dataclass(frozen=True, slots=True)
class MeasuredSystem:
    """A system under its label, its weights found."""

    label: str
    system: System
    weights: Weights = field(default_factory=Weights)
    record: SystemRecord | None = None
    """Of the earlier evaluation that is repeated: its prompt must be the same, and what its training saw stands there."""

    @property
    def model(self) -> str | None:
        """The base model, where it is known."""
        return self.system.model or self.weights.base_model

    @property
    def named(self) -> EpisodeChoice:
        """How its episodes are played, as far as the system itself says."""
        system = self.system
        return EpisodeChoice(
            format=system.format,
            renderer=system.renderer,
            thinking=system.thinking,
            instructions=system.instructions,
            n_results=system.n_results,
            max_passage_words=system.max_passage_words,
        ).completed_by(EpisodeChoice.of_limits(system.limits))


def find_systems(sources: Mapping[str, SystemSource]) -> tuple[MeasuredSystem, ...]:
    """The systems, their weights looked up.

    Raises:
        ConfigurationError: none, a blank label, or a run of one model asked for as another.
        RunFolderError: a folder holds no run, or not these weights.
    """
    if not sources:
        raise ConfigurationError("there is no system to measure: give systems={label: run, …}, or leave systems out")
    return tuple(_find(label, source) for label, source in sources.items())


def _find(label: str, source: SystemSource) -> MeasuredSystem:
    if not isinstance(label, str) or not label.strip():
        raise ConfigurationError(f"a system's label is {label!r}: give it some text")
    system = source if isinstance(source, System) else System(checkpoint=source)
    assert not isinstance(system.checkpoint, RecordedRun), "a run is its folder from its making on"
    weights = find_weights(system.checkpoint, system.step, service_folder=system.service_folder)
    base = weights.base_model
    if system.model is not None and base is not None and not is_same_place(system.model, base):
        raise ConfigurationError(
            f"{label!r} was trained from {base} and cannot be measured as {system.model}: leave its model out"
        )
    return MeasuredSystem(storable(label), system, weights)  # as its episodes' files will name it


def with_baselines(sources: Mapping[str, SystemSource], methods: tuple[Method, ...]) -> dict[str, SystemSource]:
    """The systems, and the base model used in these other ways.

    Raises:
        ConfigurationError: a system has a baseline's label.
    """
    out = dict(sources)
    for method in methods:
        if method in out:
            raise ConfigurationError(
                f"a system and a baseline are both called {method!r}: give the system another label"
            )
        out[method] = System(method=method)
    return out


def search_of_runs(systems: Sequence[MeasuredSystem]) -> Search | None:
    """The search that the runs among the systems were trained with, each to see as many passages as in its training.

    Reads a corpus whole: call it in a worker thread.

    Returns:
        None where no run searches, or they do not describe one and the same search.

    Raises:
        ConfigurationError: it cannot be made here, or gives other answers than in training.
        CorpusError, EmbeddingError, StoreError: as :meth:`Search.from_description`.
    """
    runs = [each.weights.run for each in systems if each.weights.run is not None and each.system.method != "direct"]
    described = [_source_of(kept_record(run)) for run in runs]
    if not described or None in described or any(each != described[0] for each in described):
        return None
    kept_search(runs[0])  # refuses what is not the search of the training
    return Search.from_description(described[0] or {})


def _source_of(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How a run's search is made, without the passages that it shows."""
    description = None if record is None else record["description"]
    if description is None:
        return None
    return {name: value for name, value in description.items() if name not in ("n_results", "max_passage_words")}

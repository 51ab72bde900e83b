"""The systems of an evaluation: weights and how they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from searchr1_async.boundary.paths import FilePath, is_same_place
from searchr1_async.boundary.settings import Count, Natural, check_settings
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.table import storable
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.manifest import SystemRecord
from searchr1_async.models import Thinking
from searchr1_async.runs.folder import kept_search
from searchr1_async.runs.recorded import RecordedRun
from searchr1_async.runs.weights import EpisodeChoice, GivenWeights, Step, Weights, find_weights, kept_record
from searchr1_async.search.search import Search


@dataclass(frozen=True, slots=True)
class System:
    """Weights and how they are used.

    ``System()`` is the base model with the search tool, ``System(method="direct")`` the base model without it. Settings left at
    None come from the evaluation, then from the run's training.

    Raises:
        ConfigurationError: an unknown method.
    """

    checkpoint: GivenWeights | RecordedRun | None = None
    """A run, its folder, or a ``tinker://`` path; None is the base model."""
    step: Step = "last"
    """Which of a run's kept weights: ``"last"``, ``"best"`` on held-out questions, or an optimiser step."""
    model: str | None = None
    """Base model; None is that of the run or the evaluation."""
    method: Method = "search"
    """``search``, or a baseline: ``direct`` (no search), ``rag`` (one search with the question), ``recipe`` (the prompt of
    tinker-cookbook's recipe)."""
    format: str | None = None
    """Tool-call format."""
    renderer: str | None = None
    """Chat format."""
    thinking: Thinking = None
    instructions: str | None = None
    """System prompt; a baseline uses its method's."""
    limits: EpisodeLimits | None = None
    """Episode limits; prompts that ask for reasoning need higher ones."""
    n_results: Count | None = None
    """Passages per query; a number set on the search takes precedence over training."""
    max_passage_words: Natural | None = None
    """Words per passage, 0 for no limit; precedence as for ``n_results``."""
    service_folder: FilePath | None = None
    """The embedded service's folder with a ``tinker://`` checkpoint; not needed for a run."""

    def __post_init__(self) -> None:
        check_settings(self)


SystemSource = System | GivenWeights | RecordedRun | None
"""A system; or a run, its folder or a ``tinker://`` path, used with the search tool; None is the base model."""


@dataclass(frozen=True, slots=True)
class MeasuredSystem:
    """A labelled system with its weights resolved."""

    label: str
    system: System
    weights: Weights = field(default_factory=Weights)
    record: SystemRecord | None = None
    """Record of a repeated evaluation, with the prompt's digest and the training overlap."""

    @property
    def model(self) -> str | None:
        return self.system.model or self.weights.base_model

    @property
    def named(self) -> EpisodeChoice:
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
    """Resolves the systems' weights. Raises ConfigurationError for bad labels or models, RunFolderError for bad folders."""
    if not sources:
        raise ConfigurationError("there is no system to evaluate: pass systems={label: run, …}, or omit systems")
    return tuple(_find(label, source) for label, source in sources.items())


def _find(label: str, source: SystemSource) -> MeasuredSystem:
    if not isinstance(label, str) or not label.strip():
        raise ConfigurationError(f"a system's label is {label!r}: it must be non-blank text")
    system = source if isinstance(source, System) else System(checkpoint=source)
    assert not isinstance(system.checkpoint, RecordedRun), "System replaces a run by its folder"
    weights = find_weights(system.checkpoint, system.step, service_folder=system.service_folder)
    base = weights.base_model
    if system.model is not None and base is not None and not is_same_place(system.model, base):
        raise ConfigurationError(
            f"{label!r} was trained from {base} and cannot be evaluated as {system.model}: omit its model"
        )
    return MeasuredSystem(storable(label), system, weights)  # as in the episode files


def with_baselines(sources: Mapping[str, SystemSource], methods: tuple[Method, ...]) -> dict[str, SystemSource]:
    """The systems plus these baselines. Raises ConfigurationError if a system has a baseline's label."""
    out = dict(sources)
    for method in methods:
        if method in out:
            raise ConfigurationError(f"a system and a baseline are both called {method!r}: rename the system")
        out[method] = System(method=method)
    return out


def search_of_runs(systems: Sequence[MeasuredSystem]) -> Search | None:
    """The search that all runs were trained with, without its passage settings; None if there is no single one.

    Reads a whole corpus: call it in a worker thread. Raises ConfigurationError if the search differs from training, and the
    errors of :meth:`Search.from_description`.
    """
    runs = [each.weights.run for each in systems if each.weights.run is not None and each.system.method != "direct"]
    described = [_source_of(kept_record(run)) for run in runs]
    if not described or None in described or any(each != described[0] for each in described):
        return None
    kept_search(runs[0])  # raises if it differs from training
    return Search.from_description(described[0] or {})


def _source_of(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A run's search description without its passage settings."""
    description = None if record is None else record["description"]
    if description is None:
        return None
    return {name: value for name, value in description.items() if name not in ("n_results", "max_passage_words")}

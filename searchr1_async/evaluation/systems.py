"""What is measured: weights, and a way to use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from searchr1_async.arguments import GivenWeights
from searchr1_async.boundary.paths import FilePath, is_same_place
from searchr1_async.boundary.settings import check_settings
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.methods import Method
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.manifest import SystemRecord
from searchr1_async.models import Thinking
from searchr1_async.recorded import RecordedRun
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
    """Tool-call format; None is the evaluation's."""
    thinking: Thinking = None
    """Whether the model thinks; None is the evaluation's, and where that says nothing either, as the run was trained."""
    instructions: str | None = None
    """The system prompt; None is the method's own."""
    limits: EpisodeLimits | None = None
    """How long its episodes may become; None is as the evaluation says. A prompt that asks for thoughts needs room for them."""
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

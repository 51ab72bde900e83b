"""What happens in a run, as values: the one small interface through which the engine is watched.

The engine calls ``emit(event)``; whoever watches (metrics, records, dashboard) subscribes. ``emit`` never blocks and
never raises into the engine. This module stands right above the values of an episode, below every room that emits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from searchr1_async.episodes.types import Episode, Group


@dataclass(frozen=True, slots=True)
class Event:
    """The root of all events."""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """One line in words for the person who watches."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class PhaseStarted(Event):
    """A long piece of work began: ``index``, ``evaluate``, ``warm-up``, ``train``."""

    phase: str
    total: int
    """Units of work in it (passages, episodes, steps)."""
    unit: str
    label: str = ""
    """Which one, for phases that occur several times (``untrained``, ``after RL``)."""
    seconds_at_most: float | None = None
    """The phase ends by then, done or not; None where only its work ends it."""


@dataclass(frozen=True, slots=True)
class PhaseAdvanced(Event):
    phase: str
    done: int
    """Units finished so far, not since the last event."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PhaseEnded(Event):
    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class EpisodeFinished(Event):
    episode: Episode
    step: int


@dataclass(frozen=True, slots=True)
class GroupFinished(Event):
    group: Group
    step: int


@dataclass(frozen=True, slots=True)
class GroupDropped(Event):
    """A finished group that is not trained on."""

    group: Group
    step: int
    reason: str
    """``constant_reward``, ``too_few_episodes``, ``too_slow`` or ``step_time_limit``."""


@dataclass(frozen=True, slots=True)
class MinibatchSubmitted(Event):
    step: int
    groups: int
    datums: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepFinished(Event):
    """An optimiser step is done *and* its resume point is on disk."""

    step: int
    """Optimiser steps finished, this one included."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    step: int
    path: str
    """The ``tinker://`` path of the training state."""


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    reason: str
    """``finished``, ``stopped`` or ``failed``."""


Emit = Callable[[Event], None]


def emit_nothing(event: Event) -> None:
    """The emitter for work that nobody watches."""

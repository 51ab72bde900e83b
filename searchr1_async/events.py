"""What happens in a run, as values: the one small interface through which the engine is watched.

The engine calls ``emit(event)``; whoever watches (metrics, records, dashboard) subscribes. ``emit`` never blocks and
never raises into the engine. This module stands right above the values of an episode, below every room that emits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from searchr1_async.episodes.types import Episode, Group
from searchr1_async.usage import TokenUsage

if TYPE_CHECKING:
    from searchr1_async.models import Price


@dataclass(frozen=True, slots=True)
class Event:
    """The root of all events."""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The services are open; work begins. Index building, which needs no model, may come before."""

    kind: Literal["train", "evaluate", "rollout"]
    model: str
    """As the Tinker service calls it; prices are kept by it."""
    is_embedded: bool
    """The model runs on this machine, in the embedded service: its tokens cost nothing."""
    embedder: str
    """Name of the search's embedder."""
    out_dir: str | None = None
    """The run's folder; None for work that keeps none."""
    step: int = 0
    """Optimiser steps done before: over 0 where a run is resumed."""
    total_steps: int | None = None
    group_size: int = 1
    """Episodes a question."""
    groups_per_batch: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run was given, as plain JSON values; no secret is among them."""
    is_tinker: bool = False
    """The model runs in Tinker's own cloud: its prices apply. A service of one's own has prices that nobody here knows."""
    price: Price | None = None
    """What the user says that the model's tokens cost; None where the table of prices tells."""
    used: TokenUsage = field(default_factory=TokenUsage)
    """Tokens of the run's earlier sessions."""
    spent: float | None = 0.0
    """US dollars that these cost; None where it is not known."""


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
class RolloutSampled(Event):
    """How the playing stands, a few times a second for as long as an engine is open. Counts of now, unless they say otherwise."""

    episodes: int
    """Under way: those in ``sampling``, ``queued`` and ``searching``, and a few between two of them."""
    sampling: int
    """Wait for the model."""
    queued: int
    """Wait for the right to ask the model: as many as the service and this process carry are sampling."""
    searching: int
    """Wait for the search."""
    groups: int
    """Under way."""
    finished_episodes: int
    """Since the engine was opened, evaluations included."""
    prompt_tokens: int
    """Sent to the model since the engine was opened: each turn's whole prompt, also where the service has its beginning cached, and
    a shared one for each of its samples."""
    sampled_tokens: int
    """Since the engine was opened."""
    search: Mapping[str, float]
    """Totals since the search was made, by the names of ``SearchStatistics.metrics``."""
    limited_by: str
    """Why no more samples are in flight: a :class:`~searchr1_async.rollout.limit.Cause`."""
    loop_lag_p50: float
    """Seconds by which the event loop's timers were late in the last second, in the median."""
    loop_lag_p99: float
    loop_lag_max: float
    cpu: float
    """Seconds of CPU a second of this process in the last second."""
    is_paused: bool = False
    cached_prompt_tokens: int = 0
    """Among ``prompt_tokens``, those billed as cache hits."""


@dataclass(frozen=True, slots=True)
class PipelineChanged(Event):
    """How learning stands, told whenever it changes."""

    step: int
    """The batch that is open, counted from 1."""
    policy_version: int
    """Optimiser steps done before the newest weights that are sampled from."""
    batch_groups: int
    """Groups that the open batch takes."""
    taken_groups: int
    """Of which it has so many, dropped ones included."""
    waiting_groups: int
    """Finished, and not yet taken into a batch."""
    trainer: Literal["idle", "learning", "stepping"]
    """``learning``: minibatches of the open batch are at the trainer; ``stepping``: a closed batch's optimiser step is."""


@dataclass(frozen=True, slots=True)
class EpisodeFinished(Event):
    """An episode of training; those of evaluations and of plain rollouts are told by their phase's progress."""

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
class BesideSampled(Event):
    """A service read and sampled beside the episodes: log-probabilities of the base model for the penalty on leaving it, or a turn
    of a question that :meth:`~searchr1_async.run.Run.ask` asks."""

    prompt_tokens: int
    cached_prompt_tokens: int
    """Among ``prompt_tokens``, those billed as cache hits."""
    sampled_tokens: int
    """For log-probabilities one a request."""


@dataclass(frozen=True, slots=True)
class MinibatchLearned(Event):
    """The trainer has its gradient."""

    step: int
    datums: int
    tokens: int


@dataclass(frozen=True, slots=True)
class BatchClosed(Event):
    """A step's last minibatch and its optimiser step are at the trainer; the next batch is open."""

    step: int
    groups: int
    """Taken, dropped ones included."""


@dataclass(frozen=True, slots=True)
class WeightsPublished(Event):
    """What begins from now on is sampled from the weights after this step."""

    step: int


@dataclass(frozen=True, slots=True)
class StepFinished(Event):
    """An optimiser step is done *and* its resume point is on disk."""

    step: int
    """Optimiser steps finished, this one included."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationFinished(Event):
    label: str
    """``untrained``, ``after RL``, ``step 20``, …"""
    step: int | None
    """Optimiser steps done before its weights."""
    metrics: Mapping[str, float]
    """``exact_match`` with ``exact_match_low`` and ``exact_match_high`` (95 % interval), ``questions``, ``episodes``, and for each
    suite ``exact_match/<suite>``."""


@dataclass(frozen=True, slots=True)
class RunPaused(Event):
    """Nothing more is asked of the services until it goes on."""


@dataclass(frozen=True, slots=True)
class RunResumed(Event):
    """It goes on after a pause."""


@dataclass(frozen=True, slots=True)
class ServiceSilent(Event):
    """The Tinker service does not answer: the run is held until it does, or until it has waited for long enough."""


@dataclass(frozen=True, slots=True)
class ServiceAnswers(Event):
    """The Tinker service answers again."""


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    step: int
    path: str
    """The ``tinker://`` path of the training state."""


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    reason: str
    """``finished``, ``time_limit``, ``max_cost``, ``stopped`` or ``failed``."""


Emit = Callable[[Event], None]


def emit_nothing(event: Event) -> None:
    """The emitter for work that nobody watches."""

"""Events of a run: the one interface through which the engine is observed.

The engine calls ``emit(event)``; metrics, records and dashboards subscribe. ``emit`` never blocks and never raises into the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from searchr1_async.billing import TokenUsage
from searchr1_async.episodes.types import Episode, Group

if TYPE_CHECKING:
    from searchr1_async.models import Price


@dataclass(frozen=True, slots=True)
class Event:
    """Base class of all events."""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The services are open and work starts. Index building, which needs no model, may come before."""

    kind: Literal["train", "evaluate", "rollout"]
    model: str
    """The Tinker service's name of the model, which is also its key in the price table."""
    is_embedded: bool
    """The model runs in the embedded service on this machine and costs nothing."""
    embedder: str
    """Name of the search's embedder."""
    out_dir: str | None = None
    """The run's folder; None for work without one."""
    step: int = 0
    """Optimiser steps done before; above 0 in a resumed run."""
    total_steps: int | None = None
    group_size: int = 1
    """Episodes per question."""
    groups_per_batch: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings as plain JSON values, without secrets."""
    is_tinker: bool = False
    """The model runs in Tinker's cloud, whose prices apply; other services have unknown prices."""
    price: Price | None = None
    """The user's price; None to use the price table."""
    used: TokenUsage = field(default_factory=TokenUsage)
    """Tokens used by the run's earlier sessions."""
    spent: float | None = 0.0
    """US dollars spent on ``used``; None if unknown."""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """A one-line message for the user."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class PhaseStarted(Event):
    """A long phase starts: ``index``, ``evaluate``, ``warm-up``, ``train``."""

    phase: str
    total: int
    """Units of work (passages, episodes, steps)."""
    unit: str
    label: str = ""
    """Distinguishes repeated phases (``untrained``, ``after RL``)."""
    seconds_at_most: float | None = None
    """The phase ends after this long, done or not; None: no limit."""


@dataclass(frozen=True, slots=True)
class PhaseAdvanced(Event):
    phase: str
    done: int
    """Units finished in total."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PhaseEnded(Event):
    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RolloutSampled(Event):
    """Rollout telemetry at 4 Hz while an engine is open. Gauges unless marked as totals."""

    episodes: int
    """In flight: ``sampling``, ``queued``, ``searching``, and a few in between."""
    sampling: int
    """Waiting for the model."""
    queued: int
    """Waiting for a sampling slot: the concurrency limit is reached."""
    searching: int
    """Waiting for the search."""
    groups: int
    """In flight."""
    finished_episodes: int
    """Total since the engine opened, evaluations included."""
    prompt_tokens: int
    """Total since the engine opened: every turn's whole prompt, cached or not, and a shared first prompt once per sample."""
    sampled_tokens: int
    """Total since the engine opened."""
    search: Mapping[str, float]
    """Totals since the search was created, named as in ``SearchStatistics.metrics``."""
    limited_by: str
    """What limits samples in flight: a :class:`~searchr1_async.rollout.limit.Cause`."""
    loop_lag_p50: float
    """Median lateness of the event loop's timers over the last second, in seconds."""
    loop_lag_p99: float
    loop_lag_max: float
    cpu: float
    """CPU seconds per second of this process over the last second."""
    is_paused: bool = False
    cached_prompt_tokens: int = 0
    """The part of ``prompt_tokens`` billed as cache hits."""


@dataclass(frozen=True, slots=True)
class PipelineChanged(Event):
    """State of the learning pipeline, emitted on every change."""

    step: int
    """The open batch, counted from 1."""
    policy_version: int
    """Optimiser steps behind the newest sampling weights."""
    batch_groups: int
    """Groups in the open batch when full."""
    taken_groups: int
    """Groups in it so far, dropped ones included."""
    waiting_groups: int
    """Finished groups not yet in a batch."""
    trainer: Literal["idle", "learning", "stepping"]
    """``learning``: minibatches of the open batch are at the trainer; ``stepping``: a closed batch's optimiser step is."""


@dataclass(frozen=True, slots=True)
class EpisodeFinished(Event):
    """A training episode finished; evaluations and plain rollouts report through their phase's progress."""

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
    """Sampling outside the rollout: base-model log-probabilities for the KL penalty, or a turn of a question of
    :meth:`~searchr1_async.runs.run.Run.ask`."""

    prompt_tokens: int
    cached_prompt_tokens: int
    """The part of ``prompt_tokens`` billed as cache hits."""
    sampled_tokens: int
    """One per log-probability request."""


@dataclass(frozen=True, slots=True)
class MinibatchLearned(Event):
    """The trainer has the minibatch's gradient."""

    step: int
    datums: int
    tokens: int


@dataclass(frozen=True, slots=True)
class BatchClosed(Event):
    """A batch's last minibatch and its optimiser step are at the trainer; the next batch is open."""

    step: int
    groups: int
    """Groups in the batch, dropped ones included."""


@dataclass(frozen=True, slots=True)
class WeightsPublished(Event):
    """New episodes are sampled from the weights after this step."""

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
    """Optimiser steps behind its weights."""
    metrics: Mapping[str, float]
    """``exact_match`` with ``exact_match_low`` and ``exact_match_high`` (95 % interval), ``questions``, ``episodes``, and
    ``exact_match/<suite>`` per suite."""


@dataclass(frozen=True, slots=True)
class RunPaused(Event):
    """The run sends no new requests until it resumes."""


@dataclass(frozen=True, slots=True)
class RunResumed(Event):
    """The run continues after a pause."""


@dataclass(frozen=True, slots=True)
class ServiceSilent(Event):
    """The Tinker service does not answer: the run is paused until it does, or until the outage limit."""


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
    """Discards the event."""

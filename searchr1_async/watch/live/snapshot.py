"""How a run stands at one moment, as values: what :class:`searchr1_async.watch.state.RunState` gives to all views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from searchr1_async.billing import Cost
from searchr1_async.usage import TokenUsage

RATE_SECONDS = 10.0
"""Rates are over this last while."""

Standing = Literal["starting", "running", "paused", "ended"]


@dataclass(frozen=True, slots=True)
class PhaseState:
    """A phase under way."""

    name: str
    label: str
    done: int
    total: int
    unit: str
    seconds: float
    """Since it began."""
    seconds_left: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SearchState:
    """What the search does."""

    queries: int
    """Since it was made."""
    queries_a_second: float
    cache_hit_rate: float
    p50: float
    """Seconds a call."""
    p99: float
    faults: int
    """Requests tried again, since it was made."""
    failed: int
    """Calls that failed for good, since it was made."""
    failed_lately: int
    """Of these, within the last :data:`RATE_SECONDS`."""
    seconds_down: float
    """For how long one of its services has been down; 0 while both are up."""


@dataclass(frozen=True, slots=True)
class EvaluationState:
    label: str
    step: int | None
    exact_match: float
    low: float
    high: float
    suites: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NoticeState:
    text: str
    age: float
    """Seconds since it came last; none pass once the run has ended."""
    count: int
    """How often it came since it was first said."""


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """Episodes that finished since the last batch was closed."""

    episodes: int = 0
    """Complete and failed ones."""
    failed: int = 0
    error: str = ""
    """Of the last one that failed."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Means over the complete ones, by the names of :data:`~searchr1_async.watch.live.series.CURVES`."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviations over episodes."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How the run stands at one moment. Plain values: ``dataclasses.asdict`` gives what JSON can hold."""

    standing: Standing
    reason: str
    """Why it ended; empty before."""
    seconds: float
    """Since the first event."""
    kind: str
    model: str
    is_embedded: bool
    is_tinker: bool
    is_resumed: bool
    """Its counts of episodes and tokens are those of this session."""
    embedder: str
    out_dir: str | None
    group_size: int
    step: int
    """Optimiser steps finished."""
    total_steps: int | None
    phases: tuple[PhaseState, ...]
    """Those under way, in the order of their beginning."""
    episodes: int
    """Under way."""
    sampling: int
    queued: int
    searching: int
    groups: int
    """Under way."""
    finished_episodes: int
    episodes_a_second: float
    limited_by: str
    batch: OpenBatch
    step_of_batch: int
    """Of the batch that is open, counted from 1; 0 before anything is known of it."""
    batch_groups: int
    taken_groups: int
    waiting_groups: int
    trainer: str
    """``idle``, ``learning``, ``stepping``; empty before anything is known of it."""
    policy_version: int
    staleness: float | None
    """Mean of the last finished step, in optimiser steps."""
    dropped: Mapping[str, int]
    """Groups that were not trained on, by reason."""
    finished_groups: int
    constant_groups_in_a_row: int
    """The last so many groups differed in no reward; 0 where a group is one episode."""
    search: SearchState | None
    used: TokenUsage
    """Tokens asked of the service, earlier sessions of the run included."""
    cost: Cost
    """What those cost."""
    loop_lag_p50: float
    loop_lag_p99: float
    late_for: float
    """Seconds for which the event loop has been late without a break."""
    longest_hold: float
    """Seconds: the longest that the loop was held within the last half minute."""
    cpu: float | None
    """None before the first reading."""
    evaluations: tuple[EvaluationState, ...]
    """The last few."""
    warnings: tuple[NoticeState, ...]
    """Those said lately, the last one last."""
    last_notice: str
    checkpoint: str
    seconds_a_step: float | None
    latest: Mapping[str, float | None]
    """The last finished step's row."""

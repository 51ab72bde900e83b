"""Immutable snapshots of a run, produced by :class:`searchr1_async.watch.state.RunState` for all views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from searchr1_async.billing import Cost, TokenUsage

RATE_SECONDS = 10.0
"""Window for rates."""

Standing = Literal["starting", "running", "paused", "ended"]


@dataclass(frozen=True, slots=True)
class PhaseState:
    """An active phase."""

    name: str
    label: str
    done: int
    total: int
    unit: str
    seconds_left: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SearchState:
    queries_per_second: float
    cache_hit_rate: float
    p50: float
    """Seconds per call."""
    p99: float
    faults: int
    """Retried requests, in total."""
    failed: int
    """Calls that failed after all retries, in total."""
    failed_lately: int
    """Failed calls within the last :data:`RATE_SECONDS`."""
    seconds_down: float
    """How long one of its services has been down; 0 while both are up."""


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
    """Seconds since the last occurrence; frozen once the run has ended."""
    count: int
    """Number of occurrences."""


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """Episodes finished since the last batch was closed."""

    episodes: int = 0
    """Complete and failed."""
    failed: int = 0
    error: str = ""
    """Of the most recent failed episode."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Means over complete episodes, keyed as :data:`~searchr1_async.watch.live.series.CURVES`."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviations over episodes."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Plain values: ``dataclasses.asdict`` gives JSON-compatible data."""

    standing: Standing
    reason: str
    """Why the run ended; empty before."""
    seconds: float
    """Since the first event."""
    kind: str
    model: str
    is_resumed: bool
    """Episode and token counts cover this session only."""
    out_dir: str | None
    step: int
    """Optimiser steps finished."""
    total_steps: int | None
    phases: tuple[PhaseState, ...]
    """Active phases, in start order."""
    episodes: int
    """In flight."""
    sampling: int
    queued: int
    searching: int
    groups: int
    """In flight."""
    finished_episodes: int
    episodes_per_second: float
    limited_by: str
    batch: OpenBatch
    step_of_batch: int
    """Step of the open batch, counted from 1; 0 while unknown."""
    batch_groups: int
    taken_groups: int
    waiting_groups: int
    trainer: str
    """``idle``, ``learning`` or ``stepping``; empty while unknown."""
    policy_version: int
    staleness: float | None
    """Mean over the last finished step, in optimiser steps."""
    dropped: Mapping[str, int]
    """Groups not trained on, by reason."""
    finished_groups: int
    constant_groups_in_a_row: int
    """Consecutive groups whose rewards are all equal; always 0 for a group size of 1."""
    search: SearchState | None
    used: TokenUsage
    """Tokens billed by the service, earlier sessions included."""
    cost: Cost
    """Cost of :attr:`used`."""
    loop_lag_p50: float
    loop_lag_p99: float
    late_for: float
    """Seconds for which the event loop has been late without interruption."""
    longest_stall: float
    """Longest event-loop stall of the last 30 s, in seconds."""
    cpu: float | None
    """None before the first reading."""
    evaluations: tuple[EvaluationState, ...]
    """The most recent ones."""
    warnings: tuple[NoticeState, ...]
    """Recent warnings, newest last."""
    last_notice: str
    seconds_per_step: float | None
    latest: Mapping[str, float | None]
    """Curve values of the last finished step."""

"""Immutable snapshots of a run, produced by :class:`searchr1_async.watch.state.RunState` for all views.

A run's curves in bounded memory; old steps are merged pairwise.
"""

from __future__ import annotations

import math
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
    """Means over complete episodes, keyed as :data:`~searchr1_async.watch.snapshot.CURVES`."""
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


CURVES = {
    "reward": "env/all/reward/total",
    "exact_match": "env/all/correct",
    "turns": "env/all/turns_per_episode",
    "valid_calls": "env/all/valid_calls",
}
"""The live view's curves, and the step metric behind each."""

Row = dict[str, float | None]
"""``step`` and a value per curve; None where the step has none."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of a series a reader has received."""

    generation: int = -1
    settled: int = 0


class Series:
    """One row per step; past ``limit`` rows, neighbouring rows are merged into their means, repeatedly.

    The last row may be incomplete. All earlier rows stay fixed until the next merge, so a page only needs the new ones
    (:meth:`since`).
    """

    def __init__(self, limit: int = 500) -> None:
        self._limit = max(2, limit + limit % 2)
        self._settled: list[Row] = []
        self._open: list[Row] = []
        self._stride = 1
        self._generation = 0
        self._last = -math.inf
        self.added = 0
        """Total steps added."""

    def __len__(self) -> int:
        return len(self._settled) + bool(self._open)

    @property
    def steps_per_row(self) -> int:
        return self._stride

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step; steps not after the last one are ignored."""
        if step <= self._last:
            return
        self._last = step
        self.added += 1
        row: Row = {"step": float(step)}
        for curve, metric in CURVES.items():
            row[curve] = finite(metrics.get(metric))
        self._open.append(row)
        if len(self._open) < self._stride:
            return
        self._settled.append(mean_row(self._open))
        self._open = []
        if len(self._settled) >= self._limit:
            self._settled = [mean_row(self._settled[at : at + 2]) for at in range(0, len(self._settled), 2)]
            self._stride *= 2
            self._generation += 1

    def rows(self, first: int = 0) -> list[Row]:
        """Rows from ``first`` on, including the incomplete last one."""
        rows = self._settled[first:]
        return [*rows, mean_row(self._open)] if self._open else rows

    def since(self, mark: Mark) -> tuple[int, list[Row], Mark]:
        """What a reader at ``mark`` lacks: the first new row's index, the new rows, and the new mark."""
        first = mark.settled if mark.generation == self._generation else 0
        return first, self.rows(first), Mark(self._generation, len(self._settled))


def mean_row(rows: list[Row]) -> Row:
    """Mean of each value over the rows that have it."""
    if len(rows) == 1:
        return rows[0]
    merged: Row = {}
    for name in ("step", *CURVES):
        known = [value for row in rows if (value := row[name]) is not None]
        merged[name] = sum(known) / len(known) if known else None
    return merged


def finite(value: object) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

"""What a contender cost between two moments: CPU, memory and the lateness of its event loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.shared.monitor import TICK, Observed
from benchmarks.shared.report import Goal

Row = Mapping[str, Any]
LATE_SIZE, LAG_P99, LAG_MAX = 128, 0.025, 0.060
"""Groups, and the most seconds of lateness asked for at this size."""
MEMORY_GOAL = 100
"""KB an episode in flight."""
CLIENT_COLUMNS = "client CPU an episode | peak memory (growth an episode in flight) | loop late, p99 (max) | of that its own | most in flight"


def client_figures(observed: Observed, began: float, ended: float, episodes: int) -> dict[str, float]:
    """CPU in ms per episode, memory in bytes, lateness in seconds."""
    cpu = _at(observed, ended, 1) - _at(observed, began, 1)
    memory = [use[2] for use in observed.usage if began <= use[0] <= ended]
    start_memory = _at(observed, began, 2)
    return {
        "cpu_ms_an_episode": 1000 * cpu / episodes,
        "memory_peak": max(memory, default=start_memory),
        "memory_growth": max(memory, default=start_memory) - start_memory,
        **_lags(observed, began, ended),
    }


def _at(observed: Observed, when: float, column: int) -> float:
    """CPU (1) or memory (2) at a moment, between the two looks around it."""
    moments = [use[0] for use in observed.usage]
    return float(np.interp(when, moments, [use[column] for use in observed.usage]))


def _lags(observed: Observed, began: float, ended: float) -> dict[str, float]:
    """How late the loop was, in seconds, of all looks; those not kept were hardly late at all."""
    late = [lag for lag in observed.lags if began <= lag[0] <= ended + lag[1]]
    # A loop that is late is looked at less often; its looks are those of the time that was left.
    looks = max(len(late), round((ended - began - sum(lag[1] for lag in late)) / TICK))
    shares = {}
    for name, column in (("lag", 1), ("lag_own", 2)):
        values = np.zeros(looks)
        values[: len(late)] = [lag[column] for lag in late]
        shares |= {f"{name}_p99": float(np.percentile(values, 99)), f"{name}_max": float(values.max(initial=0.0))}
    return shares


def client_cells(row: Row) -> str:
    """What :func:`client_figures` found, as the cells under :data:`CLIENT_COLUMNS`."""
    growth = row["memory_growth"] / row["in_flight"] / 1024
    memory = f"{row['memory_peak'] / 2**20:.0f} MB ({growth:.0f} KB)"
    return f"{row['cpu_ms_an_episode']:.1f} ms | {memory} | {lag_cells(row)} | {row['in_flight']:,}"


def lag_cells(row: Row) -> str:
    """How late the loop was, and its own part of it."""
    return " | ".join(
        f"{1000 * row[f'{name}_p99']:.0f} ({1000 * row[f'{name}_max']:.0f}) ms" for name in ("lag", "lag_own")
    )


def lateness_goal(row: Row, way: str) -> Goal:
    """Asked of the way at :data:`LATE_SIZE`."""
    return Goal(
        f"{way}: the loop late by at most {1000 * LAG_P99:.0f} ms (p99), {1000 * LAG_MAX:.0f} ms (ever)",
        f"{row['groups']} x 8",
        f"{1000 * row['lag_p99']:.0f}, {1000 * row['lag_max']:.0f} ms",
        row["lag_p99"] <= LAG_P99 and row["lag_max"] <= LAG_MAX,
    )


def memory_goal(small: Row, large: Row, way: str) -> Goal:
    """Asked of the way, from the growth of a small run to that of a large one."""
    more = large["in_flight"] - small["in_flight"]
    kilobytes = (large["memory_growth"] - small["memory_growth"]) / more / 1024 if more > 0 else math.inf
    what = f"{way}: each further episode in flight takes at most {MEMORY_GOAL} KB"
    return Goal(what, f"{small['groups']} to {large['groups']} x 8", f"{kilobytes:.0f} KB", kilobytes <= MEMORY_GOAL)

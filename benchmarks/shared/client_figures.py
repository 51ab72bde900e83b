"""What a contender cost between two moments: CPU, memory and the lateness of its event loop."""

from __future__ import annotations

import numpy as np

from benchmarks.shared.monitor import TICK, Observed


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

"""The figures of one run of the throughput benchmark, from the service's log and what was observed in the contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.shared.monitor import TICK, Observed
from benchmarks.shared.scripted_episodes import GROUP_SIZE, World
from benchmarks.throughput.floor import (
    courses,
    episodes_seen,
    pipelined_floor,
    run_seen,
    streaming_floor,
    synchronous_floor,
)
from searchr1_async.local.scripted import TrainingTimes
from searchr1_async.local.scripted_log import Served


def figures(
    world: World,
    batches: Sequence[Sequence[int]],
    served: Sequence[Served],
    observed: Observed,
    *,
    times: TrainingTimes,
    search_seconds: float,
    mode: str,
) -> dict[str, Any]:
    """One row of the table; seconds, bytes and counts between the first sample and the last step's weights.

    Raises:
        ValueError: the run did not do all its steps.
    """
    seen = run_seen(served, len(batches))
    tokens = {key: episode.tokens for key, episode in episodes_seen(served).items()}
    floors = [
        _floor(world, batches, tokens, times, search_seconds, mode, first_turn_shared=shared)
        for shared in (False, True)
    ]
    wall = seen.ended - seen.began
    episodes = GROUP_SIZE * sum(len(batch) for batch in batches)
    cpu = _at(observed, seen.ended, 1) - _at(observed, seen.began, 1)
    memory = [use[2] for use in observed.usage if seen.began <= use[0] <= seen.ended]
    start_memory = _at(observed, seen.began, 2)
    return {
        "episodes": episodes,
        "wall": wall,
        "walls": seen.walls,
        "episodes_a_second": episodes / wall,
        "floor": floors[0],
        "floor_first_turn_shared": floors[1],
        "cpu_ms_an_episode": 1000 * cpu / episodes,
        "memory_peak": max(memory, default=start_memory),
        "in_flight": seen.in_flight,
        "memory_growth": max(memory, default=start_memory) - start_memory,
        **_lags(observed, seen.began, seen.ended),
        "sample_requests": seen.sample_requests,
        "samples": seen.samples,
        "forward_backwards": seen.forward_backwards,
        "optimizer_steps": seen.optimizer_steps,
        "saves": seen.saves,
        "examples": seen.examples,
        "training_tokens": seen.training_tokens,
        "tokens_of_episodes": sum(tokens.values()),
    }


def _floor(
    world: World,
    batches: Sequence[Sequence[int]],
    tokens: dict[tuple[int, int], int],
    times: TrainingTimes,
    search_seconds: float,
    mode: str,
    *,
    first_turn_shared: bool,
) -> float:
    at_best = courses(
        world,
        batches,
        tokens,
        per_token=times.per_token,
        search_seconds=search_seconds,
        first_turn_shared=first_turn_shared,
    )
    if mode == "asynchronous":
        return pipelined_floor(at_best, times, staleness=1)
    return sum((synchronous_floor if mode == "synchronous" else streaming_floor)(at_best, times))


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

"""The figures of one run of the throughput benchmark, from the service's log and what was observed in the contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.shared.client_figures import client_figures
from benchmarks.shared.monitor import Observed
from benchmarks.shared.scripted_episodes import GROUP_SIZE, World, episodes_seen
from benchmarks.throughput.floor import (
    courses,
    pipelined_floor,
    run_seen,
    streaming_floor,
    synchronous_floor,
)
from searchr1_async.local.process import Served, TrainingTimes


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
    return {
        "episodes": episodes,
        "wall": wall,
        "walls": seen.walls,
        "episodes_a_second": episodes / wall,
        "floor": floors[0],
        "floor_first_turn_shared": floors[1],
        **client_figures(observed, seen.began, seen.ended, episodes),
        "in_flight": seen.in_flight,
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

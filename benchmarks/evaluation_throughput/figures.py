"""The figures of one evaluation of the benchmark, from the service's log and what was observed in the contender."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.evaluation_throughput.floor import chain_of, floor, in_turn, list_schedule
from benchmarks.evaluation_throughput.load import SuiteWorld
from benchmarks.evaluation_throughput.marks import Marks
from benchmarks.evaluation_throughput.model import WARM_UP
from benchmarks.shared.client_figures import client_figures
from benchmarks.shared.monitor import Observed
from benchmarks.shared.scripted_episodes import episodes_seen
from searchr1_async.local.process import Served

BINS = 120
"""Of the places in use over time."""


def figures(
    world: SuiteWorld,
    suites: Mapping[str, Sequence[int]],
    served: Sequence[Served],
    observed: Observed,
    marks: Marks,
    *,
    places: int,
    search_seconds: float,
) -> dict[str, Any]:
    """One row of the table: seconds, bytes and counts between the contender's call and its return.

    Raises:
        ValueError: the service did not play exactly the planned episodes, each once and to its end, or the contender found
            another number of right answers than were given.
    """
    asked = list(itertools.chain.from_iterable(suites.values()))
    samples = [each for each in served if each.kind == "sample" and each.sequences[0].label != WARM_UP]
    _check(world, asked, samples, marks)
    chains = [[chain_of(world, subject, search_seconds) for subject in suite] for suite in suites.values()]
    together = list(itertools.chain.from_iterable(chains))
    began, ended = min(each.began for each in samples), max(each.ended for each in samples)
    wall, episodes = marks.ended - marks.began, len(asked)
    busy = sum(each.seconds for each in samples)
    return {
        "episodes": episodes,
        "places": places,
        "wall": wall,
        "floor": floor(together, places),
        "floor_by_suite": in_turn(floor, chains, places),
        "ideal": list_schedule(together, places),
        "ideal_by_suite": in_turn(list_schedule, chains, places),
        "before_first_sample": began - marks.began,
        "after_last_sample": marks.ended - ended,
        "playing": ended - began,
        "episodes_a_second": episodes / wall,
        "places_in_use": busy / places / (ended - began),
        "use_over_time": use_over_time(samples, places, marks.began, marks.ended),
        **client_figures(observed, marks.began, marks.ended, episodes),
        "turns": len(samples),
        "right": marks.right,
        "imports": marks.imports,
    }


def _check(world: SuiteWorld, asked: Sequence[int], samples: Sequence[Served], marks: Marks) -> None:
    planned = {(subject, 0): len(world.plan(subject).turns) for subject in asked}
    seen = {key: episode.turns for key, episode in episodes_seen(samples).items()}
    if seen != planned or len(samples) != sum(planned.values()):
        differing = [key for key in planned.keys() | seen.keys() if planned.get(key) != seen.get(key)]
        raise ValueError(
            f"{len(differing)} episodes were not played as planned, {len(samples)} turns instead of {sum(planned.values())}"
        )
    right = sum(world.plan(subject).is_right for subject in asked)
    if marks.right != right:
        raise ValueError(f"{marks.right} answers were counted as right, of {right} that were")


def use_over_time(samples: Sequence[Served], places: int, began: float, ended: float) -> list[float]:
    """The fraction of the places that samples held, in so many equal parts of the time."""
    edges = np.linspace(began, ended, BINS + 1)
    starts, stops = (np.array([getattr(each, name) for each in samples]) for name in ("began", "ended"))
    held = [
        float(np.clip(np.minimum(stops, b) - np.maximum(starts, a), 0, None).sum())
        for a, b in itertools.pairwise(edges)
    ]
    return [seconds / places / (edges[1] - edges[0]) for seconds in held]

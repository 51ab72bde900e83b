from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evaluation_throughput.floor import Chain, floor, in_turn, list_schedule


def orders(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All interleavings of the turns of several chains."""
    return iter(set(itertools.permutations([number for number, length in enumerate(lengths) for _ in range(length)])))


def best(chains: Sequence[Chain], places: int) -> int:
    """The shortest schedule, in whole seconds: every order, each turn placed as early as possible.

    These are the active schedules, one of which is the shortest (Sprecher, Kolisch and Drexl, 1995).
    """
    horizon = int(sum(chain.seconds for chain in chains)) + 1
    shortest = horizon
    for order in orders([len(chain.turns) for chain in chains]):
        used = [0] * (horizon + 1)
        ready, done = [0] * len(chains), [0] * len(chains)
        for number in order:
            chain, turn = chains[number], done[number]
            seconds = int(chain.turns[turn])
            start = ready[number]
            while any(used[moment] >= places for moment in range(start, start + seconds)):
                start += 1
            for moment in range(start, start + seconds):
                used[moment] += 1
            done[number] += 1
            ready[number] = start + seconds + int(chain.searches[turn] if turn < len(chain.searches) else 0)
        shortest = min(shortest, max(ready))
    return shortest


@st.composite
def chains(draw: st.DrawFn) -> list[Chain]:
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4).filter(lambda each: sum(each) <= 6))
    seconds = st.integers(1, 5)
    return [
        Chain(tuple(draw(seconds) for _ in range(length)), tuple(draw(st.integers(0, 4)) for _ in range(length - 1)))
        for length in lengths
    ]


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(1, 3))
def test_no_schedule_beats_the_floor_and_the_ideal_client_is_a_schedule(made: list[Chain], places: int) -> None:
    shortest = best(made, places)
    assert floor(made, places) <= shortest + 1e-9
    assert shortest <= list_schedule(made, places) + 1e-9


@pytest.mark.parametrize(
    ("made", "places", "least"),
    [
        ([Chain((2.0,)), Chain((2.0,)), Chain((2.0,)), Chain((2.0,))], 2, 4.0),  # the work over the places
        ([Chain((1.0, 1.0, 1.0), (2.0, 2.0)), Chain((1.0,))], 2, 7.0),  # the longest chain
        # Nothing long can start before 1 + 3 seconds, and then there are 8 s of it.
        ([Chain((1.0, 4.0), (3.0,)) for _ in range(2)], 1, 12.0),
        ([], 3, 0.0),
    ],
)
def test_the_floor_is_reached(made: list[Chain], places: int, least: float) -> None:
    assert floor(made, places) == pytest.approx(least)
    assert not made or best(made, places) == least


def test_waiting_for_searches_raises_the_floor() -> None:
    made = [Chain((1.0, 4.0), (3.0,)) for _ in range(4)]
    assert floor(made, 2) == pytest.approx(4.0 + 16.0 / 2)  # the work alone: 10
    assert best(made, 2) >= 12


def test_the_floor_is_at_least_the_work_and_nearly_reached() -> None:
    chance = random.Random(3)
    made = [
        Chain(tuple(chance.lognormvariate(0, 0.8) for _ in range(length)), (0.2,) * (length - 1))
        for length in chance.choices(range(1, 6), k=2_000)
    ]
    work = sum(sum(chain.turns) for chain in made)
    least = floor(made, 64)
    assert least >= work / 64
    assert least <= list_schedule(made, 64) <= 1.1 * least


def test_sequential_suites_never_have_a_lower_floor() -> None:
    chance = random.Random(5)
    suites = [[Chain((chance.uniform(0.5, 3.0), 1.0), (0.2,)) for _ in range(40)] for _ in range(7)]
    together = [chain for suite in suites for chain in suite]
    assert in_turn(floor, suites, 16) >= floor(together, 16) - 1e-9
    assert in_turn(list_schedule, suites, 16) > list_schedule(together, 16)


def test_zero_places_are_refused() -> None:
    with pytest.raises(ValueError, match="0 places"):
        floor([Chain((1.0,))], 0)

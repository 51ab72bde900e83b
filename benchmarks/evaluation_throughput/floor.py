"""The least time in which a service of so many places can play an evaluation, and what an ideal client would need.

An episode is a chain: turns, each of which holds one place for its drawn seconds without a break, and between two turns a search,
which holds none. Everything else (the network, the client, scoring) is 0. All episodes may begin at 0.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evaluation_throughput.load import SuiteWorld

_GRID = 256
"""Heads and tails that are tried, each; all of them where there are as few."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One episode at its best."""

    turns: tuple[float, ...]
    """Seconds at a place."""
    searches: tuple[float, ...] = ()
    """Seconds between two turns: one less than there are turns."""

    @property
    def seconds(self) -> float:
        """From its first turn's beginning to its last one's end, if it never waits."""
        return sum(self.turns) + sum(self.searches)

    def windows(self) -> Iterator[tuple[float, float, float]]:
        """Of every turn: the least seconds before it, its own, and the least after it."""
        before = 0.0
        for turn, search in itertools.zip_longest(self.turns, self.searches, fillvalue=0.0):
            yield before, turn, self.seconds - before - turn
            before += turn + search


def floor(chains: Sequence[Chain], places: int) -> float:
    """Seconds that no schedule of these chains at so many places beats.

    The largest of:

    - the longest chain, since its parts follow one another;
    - for any ``a`` and ``b``: ``a + b + work / places``, where ``work`` is that of the turns with at least ``a`` seconds of their
      own chain before them and at least ``b`` after them. *Proof*: let a schedule end at T. None of these turns begins before
      ``a``, for what precedes it takes so long; none ends after ``T - b``, for what follows takes so long. So all of their work
      is done within ``[a, T - b]``, in which the places offer ``places * (T - b - a)``. With ``a = b = 0`` it is the whole work over the
      places; larger ones count the time in which first turns must end before later ones can fill the places.

    Every pair gives a bound, so leaving pairs out (more than 256 different heads or tails) can only make the floor smaller.

    Raises:
        ValueError: fewer than 1 place.
    """
    if places < 1:
        raise ValueError(f"{places} places: at least 1")
    if not chains:
        return 0.0
    windows = np.array([window for chain in chains for window in chain.windows()])
    heads, seconds, tails = windows.T
    # A turn counts at a grid point if its head and tail are at least that: the grid's points are heads and tails themselves.
    head_grid, tail_grid = _grid(heads), _grid(tails)
    work = np.zeros((len(head_grid), len(tail_grid)))
    rows = np.searchsorted(head_grid, heads, side="right") - 1
    columns = np.searchsorted(tail_grid, tails, side="right") - 1
    np.add.at(work, (rows, columns), seconds)
    work = work[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]
    bounds = np.where(work > 0, head_grid[:, None] + tail_grid[None, :] + work / places, 0.0)
    return float(max(bounds.max(), max(chain.seconds for chain in chains)))


def _grid(values: np.ndarray) -> np.ndarray:
    """Different values, the least one among them, at most so many."""
    different = np.unique(values)
    if len(different) <= _GRID:
        return different
    return different[np.linspace(0, len(different) - 1, _GRID).round().astype(int)]


def list_schedule(chains: Sequence[Chain], places: int) -> float:
    """Seconds of an ideal client that keeps every place busy while any turn is ready, first come first served.

    It knows nothing of how long anything will take, as no client does; so what it needs beyond the floor is what the end costs,
    and what a real one needs beyond this is its own.
    """
    free, order = places, itertools.count()
    ready = [(0.0, next(order), number, 0) for number in range(len(chains))]  # when, who, which turn
    running: list[tuple[float, int, int]] = []
    now = 0.0
    while ready or running:
        while free and ready and ready[0][0] <= now:
            _, _, number, turn = heapq.heappop(ready)
            heapq.heappush(running, (now + chains[number].turns[turn], number, turn))
            free -= 1
        nexts = [each[0][0] for each in (running, ready if free else []) if each]
        now = max(now, min(nexts))
        while running and running[0][0] <= now:
            ended, number, turn = heapq.heappop(running)
            free += 1
            if turn + 1 < len(chains[number].turns):
                heapq.heappush(ready, (ended + chains[number].searches[turn], next(order), number, turn + 1))
    return now


def in_turn(bound: Callable[[Sequence[Chain], int], float], suites: Sequence[Sequence[Chain]], places: int) -> float:
    """Of suites one after the other, each begun when the one before has ended."""
    return sum(bound(suite, places) for suite in suites)


def chain_of(world: SuiteWorld, subject: int, search_seconds: float) -> Chain:
    """A question's episode at its best; each of its searches is for something new."""
    turns = world.plan(subject).turns
    return Chain(tuple(turn.seconds for turn in turns), (search_seconds,) * (len(turns) - 1))

"""Measures recall and speed of probes and candidates, and chooses those that reach the target recall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.compact.files import Rows
from searchr1_async.search.compact.inverted_lists import (
    MOST_OF_MEAN,
    Probing,
    margin_of,
)
from searchr1_async.search.compact.layout import (
    Calibration,
    CurvePoint,
)
from searchr1_async.search.compact.store import CompactIndex
from searchr1_async.search.embedders import Vectors

Number = TypeVar("Number", np.float32, np.int64)

CANDIDATES = (20, 50, 100, 200)
"""Tried with every number of probes."""
EXACT_RESULTS = 10
"""Minimum number of exact neighbours that recall is measured against."""
BATCH = 128
AFFORDABLE = 300_000
"""Codes compared per query up to which recall above the target is worth its cost; about 4 ms on two cores."""
_NO_DIFFERENCE = 0.001
"""Recall difference of one or two sample queries."""
_BEYOND = 0.03
"""How far above the target recall the curve is measured; the last hundredths cost as much as all before."""
_RANKING_COST = 60
"""Cost of re-ranking one candidate, in codes compared."""
_LIST_COST = 450
"""Fixed cost of one list, in codes compared."""


def probe_steps(lists: int) -> list[int]:
    """Mean numbers of probes to try: powers of sqrt(2), up to all lists."""
    steps = {min(lists, round(2 ** (half / 2))) for half in range(2 * math.ceil(math.log2(max(lists, 1))) + 1)}
    return sorted({*steps, lists})


def recall(found: Rows, exact: Rows, results: int) -> float:
    """The share of the ``results`` nearest that are found; both arrays are ``[queries, n]``."""
    exact = exact[:, :results]
    return float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())


def measure(
    index: CompactIndex,
    queries: Vectors,
    exact: Rows,
    recall_at: int,
    *,
    own_rows: Rows | None = None,
    asked: float = 0.95,
    check: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CurvePoint]:
    """Measures recall and speed of each choice, until recall :func:`is_enough`.

    Re-ranking is exact, so recall is that of the candidates, and one search serves all smaller candidate counts.

    Args:
        index: index to search.
        queries: ``[queries, dimension]``.
        exact: exact nearest rows, ``[queries, results]``.
        recall_at: number of results of the target recall.
        own_rows: ``[queries]``, a row to exclude per query.
        asked: target recall at ``recall_at``.
        check: called between batches; may raise to abort.
        clock: time in seconds.
    """
    curve: list[CurvePoint] = []
    gap = np.sort(np.concatenate([index.gaps(part) for part in _batches(queries)]), axis=1)
    for probes in probe_steps(gap.shape[1]):
        probing = probing_of(gap, probes)
        began = clock()
        parts: list[Rows] = []
        for part in _batches(queries):
            check()
            parts.append(index.candidates(part, CANDIDATES[-1] + 1, probing))
        found = np.concatenate(parts)
        searching = clock() - began
        if own_rows is not None:
            found = _without(found, own_rows)
        # Warm-up: otherwise the first choices, which read their candidates from disk, look slower than later ones.
        _rank(index, queries, found[:, : CANDIDATES[-1]], recall_at, check)
        for candidates in CANDIDATES:
            best = found[:, :candidates]
            began = clock()
            _rank(index, queries, best, recall_at, check)
            seconds = max(searching + clock() - began, 1e-9)
            curve.append(
                CurvePoint(
                    probes,
                    probing.most,
                    probing.margin,
                    candidates,
                    round(recall(best, exact, 3), 4),
                    round(recall(best, exact, 10), 4),
                    round(recall(best, exact, recall_at), 4),
                    round(len(queries) / seconds, 1),
                )
            )
        if is_enough(curve[-1], asked, index.mean_list, len(queries)):
            break
    return curve


def probing_of(gap: Vectors, probes: int) -> Probing:
    """The probing that searches ``probes`` lists on average; ``gap`` is ``[queries, lists]``, rows ascending."""
    most = min(MOST_OF_MEAN * probes, gap.shape[1])
    if probes == gap.shape[1]:
        return Probing.fixed(most)
    return Probing(margin_of(gap, probes, most), most)


def choose(curve: Sequence[CurvePoint], asked: float, mean_list: float, queries: int) -> CurvePoint:
    """The best affordable choice whose recall is a standard error above the target; else the cheapest with such a recall, else the
    one with the highest recall.

    Recall above the target is taken when cheap, since other questions may be harder than the sample. The standard error is the
    sample's: without it, half of all samples would choose too little. Costs are counted, not timed, so the choice is reproducible.

    Args:
        curve: measured points.
        asked: target recall.
        mean_list: mean codes per list.
        queries: sample size.
    """

    def cheapest(points: list[CurvePoint]) -> CurvePoint:
        return min(points, key=lambda point: (cost(point, mean_list), point.probes))

    able = [point for point in curve if surely_reaches(point.recall, asked, queries)]
    if not able:
        most = max(point.recall for point in curve)
        return cheapest([point for point in curve if point.recall == most])
    if affordable := [point for point in able if cost(point, mean_list) <= AFFORDABLE]:
        most = max(point.recall for point in affordable)
        return cheapest([point for point in affordable if point.recall >= most - _NO_DIFFERENCE])
    return cheapest(able)


def is_enough(point: CurvePoint, asked: float, mean_list: float, queries: int) -> bool:
    """Whether to stop trying more probes: the target is reached with some margin, and more is not possible or not affordable."""
    shows = point.recall >= min(asked + _BEYOND, 0.995) and surely_reaches(point.recall, asked, queries)
    return shows and (point.recall >= 1 - _NO_DIFFERENCE or cost(point, mean_list) >= AFFORDABLE)


def surely_reaches(reached: float, asked: float, queries: int) -> bool:
    """Whether recall over this many queries is a standard error above the target."""
    return reached - standard_error(reached, queries) >= asked


def standard_error(share: float, queries: int) -> float:
    """Standard error of a share over this many queries."""
    return math.sqrt(share * (1 - share) / queries)


def cost(point: CurvePoint, mean_list: float) -> float:
    """Cost per query, in codes compared."""
    return point.probes * (mean_list + _LIST_COST) + point.candidates * _RANKING_COST


def calibration_of(
    curve: Sequence[CurvePoint], asked: float, recall_at: int, mean_list: float, queries: int, origin: str
) -> Calibration:
    """The calibration record for the manifest."""
    chosen = choose(curve, asked, mean_list, queries)
    probing = (chosen.probes, chosen.most_probes, chosen.margin)
    return Calibration(queries, origin, *probing, chosen.candidates, chosen.recall, asked, recall_at, tuple(curve))


def _rank(index: CompactIndex, queries: Vectors, found: Rows, results: int, check: Callable[[], object]) -> None:
    for part, rows in zip(_batches(queries), _batches(np.ascontiguousarray(found)), strict=True):
        check()
        index.rank(part, rows, results)


def _batches(rows: NDArray[Number]) -> list[NDArray[Number]]:
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def _without(found: Rows, own_rows: Rows) -> Rows:
    """Moves each query's own row to the end, as -1."""
    own = found == own_rows[:, None]
    order = np.argsort(own, axis=1, kind="stable")
    return np.take_along_axis(np.where(own, -1, found), order, 1)

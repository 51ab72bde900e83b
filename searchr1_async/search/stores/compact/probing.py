"""Which inverted lists a query looks through: those whose centres are hardly farther than the nearest one. Decisions only, no faiss.

Easy questions have few centres near them, hard ones many. Of 21 million passages the three nearest of 95 % of 500 real questions
stood in 464,000 codes where each looked through as many lists, in 324,000 where each looked as far beyond its nearest centre
(SPANN, Chen et al. 2021, prunes its lists alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric

Lists = NDArray[np.int64]
"""Numbers of lists, counted from 0."""

MOST_OF_MEAN = 4
"""No query looks through more lists than this many times the mean: 3.3 times cost 0.001 of recall and saved a sixth of the codes."""
_LIKE = 0.6
"""Queries that are searched together look through this share, at least, of the most lists among them: others are padded to as many."""
_SAME = 16
"""Lists by which they may differ besides: less than a call costs."""


@dataclass(frozen=True, slots=True)
class Probing:
    """How far a query looks."""

    margin: float | None
    """A list is looked through whose gap (:func:`gaps`) is no larger; None: as many lists as there may be."""
    most: int
    """Lists, at most: the nearest."""

    @classmethod
    def fixed(cls, probes: int) -> Probing:
        """So many lists for every query."""
        return cls(None, probes)


def squared_lengths(vectors: Vectors) -> Vectors:
    """Of vectors ``[vectors, dimension]``."""
    return np.einsum("vd,vd->v", vectors, vectors)


def centre_distances(queries: Vectors, centres: Vectors, lengths: Vectors, metric: Metric) -> Vectors:
    """As faiss counts them, ``[queries, lists]``: inner products for ``"ip"``, squared distances for the others.

    By comparing with all: 0.56 ms a query in batches for 36,673 centres of 768 numbers, exactly, where faiss's graph (HNSW) took
    1.2 ms for the nearest 512 and missed every twentieth of them.

    Args:
        queries: ``[queries, dimension]``.
        centres: ``[lists, dimension]``.
        lengths: ``[lists]``, squared, of the centres.
        metric: of the index.
    """
    products = queries @ centres.T
    if metric == "ip":
        return products
    products *= -2
    products += squared_lengths(queries)[:, None]
    products += lengths
    return products


def gaps(distances: Vectors, queries: Vectors, metric: Metric) -> Vectors:
    """How much farther each centre is than the nearest one, ``[queries, lists]``, from 0 on.

    Args:
        distances: of :func:`centre_distances`.
        queries: ``[queries, dimension]``; inner products are counted in their lengths.
        metric: of the index.
    """
    if metric != "ip":
        return distances - distances.min(axis=1, keepdims=True)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (distances.max(axis=1, keepdims=True) - distances) / lengths


def chosen_lists(gap: Vectors, probing: Probing) -> list[Lists]:
    """The lists of each query, in no order; ``gap`` is ``[queries, lists]``."""
    most = min(probing.most, gap.shape[1])
    chosen: list[Lists] = []
    for row in gap:
        near = np.arange(len(row)) if probing.margin is None else np.flatnonzero(row <= probing.margin)
        if len(near) > most:
            near = near[np.argpartition(row[near], most - 1)[:most]]
        chosen.append(near)
    return chosen


def margin_of(gap: Vectors, mean: int, most: int) -> float | None:
    """The margin with which these queries look through ``mean`` lists on average, each through ``most`` at most.

    Args:
        gap: ``[queries, lists]``, each row in ascending order.
        mean: lists.
        most: lists; with as many as the mean, each query looks through all of them, whatever their gap (None).
    """
    if most <= mean:
        return None
    within = gap[:, :most].ravel()
    place = min(mean * len(gap), within.size) - 1
    return float(np.partition(within, place)[place])


def alike(counts: Sequence[int]) -> list[Lists]:
    """Queries that look through about as many lists each, together: groups of their places, most lists first."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    groups: list[Lists] = []
    first = 0
    for place in range(1, len(order) + 1):
        most = counts[order[first]]
        if place == len(order) or counts[order[place]] < min(_LIKE * most, most - _SAME):
            groups.append(order[first:place])
            first = place
    return groups

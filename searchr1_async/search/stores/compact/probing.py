"""Which inverted lists a query searches: those whose centre is hardly farther than the nearest one. Does not use faiss.

Easy questions have few centres near them, hard ones many, so a distance margin compares fewer codes for the same recall than a fixed
number of lists (SPANN, Chen et al. 2021, prunes lists the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric

Lists = NDArray[np.int64]
"""List numbers, from 0."""

MOST_OF_MEAN = 4
"""Maximum lists per query, as a multiple of the mean."""
_LIKE = 0.6
"""Queries searched in one call have at least this share of the call's largest list count, to which they are padded."""
_SAME = 16
"""List counts may always differ by this much: less than a call costs."""


@dataclass(frozen=True, slots=True)
class Probing:
    margin: float | None
    """Lists with a gap (see :func:`gaps`) up to this are searched; None: no limit."""
    most: int
    """Maximum number of lists, nearest first."""

    @classmethod
    def fixed(cls, probes: int) -> Probing:
        """The same number of lists for every query."""
        return cls(None, probes)


def squared_lengths(vectors: Vectors) -> Vectors:
    """Squared lengths of vectors ``[n, dimension]``."""
    return np.einsum("vd,vd->v", vectors, vectors)


def centre_distances(queries: Vectors, centres: Vectors, lengths: Vectors, metric: Metric) -> Vectors:
    """faiss's distances, ``[queries, lists]``: inner products for ``"ip"``, squared L2 otherwise.

    Brute force in batches is exact, and faster than faiss's HNSW at tens of thousands of centres.

    Args:
        queries: ``[queries, dimension]``.
        centres: ``[lists, dimension]``.
        lengths: squared lengths of the centres, ``[lists]``.
        metric: the index's metric.
    """
    products = queries @ centres.T
    if metric == "ip":
        return products
    products *= -2
    products += squared_lengths(queries)[:, None]
    products += lengths
    return products


def gaps(distances: Vectors, queries: Vectors, metric: Metric) -> Vectors:
    """How much farther each centre is than the nearest, ``[queries, lists]``, at least 0.

    Args:
        distances: from :func:`centre_distances`.
        queries: ``[queries, dimension]``; inner-product gaps are divided by their lengths.
        metric: the index's metric.
    """
    if metric != "ip":
        return distances - distances.min(axis=1, keepdims=True)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (distances.max(axis=1, keepdims=True) - distances) / lengths


def chosen_lists(gap: Vectors, probing: Probing) -> list[Lists]:
    """The lists of each query, unordered; ``gap`` is ``[queries, lists]``."""
    most = min(probing.most, gap.shape[1])
    chosen: list[Lists] = []
    for row in gap:
        near = np.arange(len(row)) if probing.margin is None else np.flatnonzero(row <= probing.margin)
        if len(near) > most:
            near = near[np.argpartition(row[near], most - 1)[:most]]
        chosen.append(near)
    return chosen


def margin_of(gap: Vectors, mean: int, most: int) -> float | None:
    """The margin with which these queries search ``mean`` lists on average, each at most ``most``.

    Args:
        gap: ``[queries, lists]``, rows ascending.
        mean: mean lists per query.
        most: maximum lists per query; if it does not exceed ``mean``, every query searches ``most`` lists (returns None).
    """
    if most <= mean:
        return None
    within = gap[:, :most].ravel()
    place = min(mean * len(gap), within.size) - 1
    return float(np.partition(within, place)[place])


def alike(counts: Sequence[int]) -> list[Lists]:
    """Groups of queries with similar list counts, largest first."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    groups: list[Lists] = []
    first = 0
    for place in range(1, len(order) + 1):
        most = counts[order[first]]
        if place == len(order) or counts[order[place]] < min(_LIKE * most, most - _SAME):
            groups.append(order[first:place])
            first = place
    return groups

"""The inverted lists of an index: learning their centres, assigning vectors to them, and choosing those that a query searches.

A query searches the lists whose centre is hardly farther than the nearest one: easy questions have few centres near them,
hard ones many, so a distance margin compares fewer codes for the same recall than a fixed number of lists (SPANN, Chen et al.
2021, prunes lists the same way).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import Metric

Lists = NDArray[np.int64]
"""List numbers, from 0."""

MOST_OF_MEAN = 4
"""Maximum lists per query, as a multiple of the mean."""
_LIKE = 0.6
"""Queries searched in one call have at least this share of the call's largest list count, to which they are padded."""
_SAME = 16
"""List counts may always differ by this much: less than a call costs."""

MOST_LISTS = 65_536
SAMPLE_PER_LIST = 40
"""Mean sample vectors per centre; faiss advises at least 39."""
MOST_SAMPLED = 500_000
"""1.5 GB as float32 at 768 dimensions."""
_ITERATIONS = 8
_GROUPED_FROM = 1_024
"""From this many lists, a vector is compared with the centres of the nearest groups, not with all."""
_GROUPS_AT_LEAST = 8
_GROUPS_LOOKED_THROUGH = 1 / 12
"""Share of all groups. Assigns 97 % of vectors to their nearest list; faiss's HNSW is faster, but assigns only 83 %."""
_COMPARED_TOGETHER = 8_192
"""Vectors per thread task; fixed, so that the assignment does not depend on the number of threads."""


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


def lists_for(count: int) -> int:
    """Default number of lists: ``8 * sqrt(count)``, with at least 64 passages each.

    Finer lists leave fewer codes to compare, but each probed list has a fixed cost of about 450 codes.
    """
    return max(1, min(int(8 * math.sqrt(count)), count // 64, MOST_LISTS))


def sample_size(count: int, lists: int) -> int:
    """Vectors to learn the centres from."""
    return min(count, max(SAMPLE_PER_LIST * lists, 10_000), MOST_SAMPLED)


def learn_centres(sample: Vectors, lists: int, seed: int, check: Callable[[], object] = lambda: None) -> Vectors:
    """Centres ``[lists, dimension]``, by k-means in two levels: coarse clusters first, then each by itself.

    Far faster than one level, which compares each vector with all centres. Deterministic for a sample, seed and thread count.

    Args:
        sample: ``[n, dimension]``, with ``n >= lists``.
        lists: number of centres.
        seed: seed of the initial centres.
        check: called between clusters; may raise to abort.
    """
    coarse = max(1, round(math.sqrt(lists)))
    if lists <= 256 or len(sample) < 4 * lists:
        return _clusters(sample, lists, seed)
    first = _clusters(sample[: 512 * coarse], coarse, seed)
    nearest = _nearest_of(sample, first, 1, "l2")[1][:, 0]
    shares = shared_out(lists, np.bincount(nearest, minlength=coarse).tolist())
    # One part at a time; all at once would copy the sample.
    found: list[Vectors] = []
    for part, share in enumerate(shares):
        check()
        if share:
            found.append(_clusters(sample[nearest == part], share, seed))
    return np.concatenate(found)


def shared_out(total: int, sizes: list[int]) -> list[int]:
    """Splits a total in proportion to sizes, by largest remainder; no share exceeds its size."""
    wanted = [total * size / sum(sizes) for size in sizes]
    shares = [min(int(share), size) for share, size in zip(wanted, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda place: int(wanted[place]) - wanted[place])
    while (left := total - sum(shares)) > 0:
        able = [place for place in by_remainder if shares[place] < sizes[place]]
        for place in able[:left]:
            shares[place] += 1
    return shares


class ListAssigner:
    """Assigns vectors to the list with the (nearly always) nearest centre.

    Centres are grouped; a vector is compared only with the centres of its nearest groups.

    Args:
        centres: ``[lists, dimension]``.
        metric: distance metric.
        seed: seed of the groups.
        threads: number of threads.
    """

    def __init__(self, centres: Vectors, metric: Metric, seed: int, threads: int = 1) -> None:
        self._centres, self._threads = centres, threads
        self._metric: Metric = metric
        self._groups: list[Lists] = []
        if len(centres) >= _GROUPED_FROM:
            heads = round(math.sqrt(len(centres)))
            # One thread: a resumed build may have another thread count and needs the same groups.
            with ThreadPoolExecutor(1, "searchr1-lists", _in_one_thread) as alone:
                self._heads = alone.submit(_clusters, centres, heads, seed, len(centres)).result()
            own = _nearest_of(centres, self._heads, 1, "l2")[1][:, 0]
            self._groups = [np.flatnonzero(own == group) for group in range(len(self._heads))]
            self._members = [centres[group] for group in self._groups]
            self._looked_through = max(_GROUPS_AT_LEAST, math.ceil(len(self._heads) * _GROUPS_LOOKED_THROUGH))

    def nearest(self, vectors: Vectors) -> Lists:
        """The list of each vector, ``[vectors]``."""
        parts = [vectors[first : first + _COMPARED_TOGETHER] for first in range(0, len(vectors), _COMPARED_TOGETHER)]
        with ThreadPoolExecutor(self._threads, "searchr1-lists", _in_one_thread) as pool:
            return np.concatenate([np.empty(0, np.int64), *pool.map(self._nearest, parts)])

    def _nearest(self, vectors: Vectors) -> Lists:
        if not self._groups:
            return _nearest_of(vectors, self._centres, 1, self._metric)[1][:, 0]
        near = _nearest_of(vectors, self._heads, self._looked_through, self._metric)[1]
        vector_of = np.argsort(near, axis=None, kind="stable") // near.shape[1]
        parts = np.split(vector_of, np.cumsum(np.bincount(near.ravel(), minlength=len(self._groups)))[:-1])
        best, lists = np.full(len(vectors), np.inf, np.float32), np.zeros(len(vectors), np.int64)
        for own, centres, here in zip(self._groups, self._members, parts, strict=True):
            if not len(own) or not len(here):
                continue
            distances, places = _nearest_of(vectors[here], centres, 1, self._metric)
            nearer = distances[:, 0] < best[here]
            best[here[nearer]], lists[here[nearer]] = distances[nearer, 0], own[places[nearer, 0]]
        return lists


def _in_one_thread() -> None:
    """Makes faiss use only the calling thread; its own threads would idle between calls."""
    import faiss

    faiss.omp_set_num_threads(1)


def _nearest_of(vectors: Vectors, centres: Vectors, count: int, metric: Metric) -> tuple[Vectors, Lists]:
    """Distances (smaller is nearer) and places of the nearest centres, both ``[n, count]``."""
    import faiss

    distances, places = faiss.knn(vectors, centres, count, metric=faiss_metric(metric))
    return (-distances if metric == "ip" else distances), places


def faiss_metric(metric: Metric) -> int:
    """For vectors as stored: cosine vectors have length 1, so L2 gives the same order."""
    import faiss

    return faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2


def _clusters(sample: Vectors, count: int, seed: int, per_cluster: int = 512) -> Vectors:
    import faiss

    if count >= len(sample):
        return np.concatenate([sample, np.repeat(sample[-1:], count - len(sample), axis=0)])
    clustering = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=per_cluster,
    )
    clustering.train(np.ascontiguousarray(sample))
    centres: Any = clustering.centroids
    return centres

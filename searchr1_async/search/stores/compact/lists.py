"""The inverted lists of an index: where their centres lie, and how a vector finds its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric
from searchr1_async.search.stores.compact.probing import Lists

MOST_LISTS = 65_536
SAMPLE_A_LIST = 40
"""Vectors that a centre is learnt from, on average; faiss advises 39 at least."""
MOST_SAMPLED = 500_000
"""1.5 GB as float32 at 768 dimensions."""
_ITERATIONS = 8
_GROUPED_FROM = 1_024
"""Lists from which a vector is compared with the centres of some groups, not with all."""
_GROUPS_AT_LEAST = 8
_GROUPS_LOOKED_THROUGH = 1 / 12
"""Of all groups. Among 36,673 centres 97 % of vectors came into the nearest list so, 13,000 a second; 95 % by a sixteenth. faiss's
graph (HNSW) puts 83 % there at 23,000 a second, 94 % at 9,700; a query has to look through many more lists for those that it loses."""


_COMPARED_TOGETHER = 8_192
"""Vectors that a thread takes: whatever the number of threads, the same ones come together, and so into the same lists."""


def lists_for(count: int) -> int:
    """Lists for so many passages: 8 for each square root, of 64 passages at least.

    A list that is probed costs as much as some 450 codes in it, and finer lists leave fewer codes to compare: of a million real and
    extended vectors, the three nearest of 95 % of questions stood in 8.2 % of all codes with 4,000 lists, in 1.2 % with 16,000.
    """
    return max(1, min(int(8 * math.sqrt(count)), count // 64, MOST_LISTS))


def sample_size(count: int, lists: int) -> int:
    """Vectors to learn the centres from."""
    return min(count, max(SAMPLE_A_LIST * lists, 10_000), MOST_SAMPLED)


def learn_centres(sample: Vectors, lists: int, seed: int, check: Callable[[], object] = lambda: None) -> Vectors:
    """Centres ``[lists, dimension]`` of the sample, by k-means in two steps: first coarse clusters, then each by itself.

    One step of k-means with 16,384 centres compares each vector with all of them, a thousand seconds on two cores; two steps
    take 17. The same sample, seed and number of threads give the same centres.

    Args:
        sample: ``[vectors, dimension]``, at least as many as lists.
        lists: how many.
        seed: of the first centres.
        check: called between clusters; ends it by raising.
    """
    coarse = max(1, round(math.sqrt(lists)))
    if lists <= 256 or len(sample) < 4 * lists:
        return _clusters(sample, lists, seed)
    first = _clusters(sample[: 512 * coarse], coarse, seed)
    nearest = _nearest_of(sample, first, 1, "l2")[1][:, 0]
    shares = shared_out(lists, np.bincount(nearest, minlength=coarse).tolist())
    # One part at a time: all at once would be the sample a second time.
    found: list[Vectors] = []
    for part, share in enumerate(shares):
        check()
        if share:
            found.append(_clusters(sample[nearest == part], share, seed))
    return np.concatenate(found)


def shared_out(total: int, sizes: list[int]) -> list[int]:
    """Shares of a total in proportion to sizes, by largest remainder; none larger than its size."""
    wanted = [total * size / sum(sizes) for size in sizes]
    shares = [min(int(share), size) for share, size in zip(wanted, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda place: int(wanted[place]) - wanted[place])
    while (left := total - sum(shares)) > 0:
        able = [place for place in by_remainder if shares[place] < sizes[place]]
        for place in able[:left]:
            shares[place] += 1
    return shares


class ListAssigner:
    """Finds the list that a vector belongs in: the one whose centre is nearest, nearly always.

    Centres lie in groups. A vector is compared with those of the groups nearest to it, and a group's vectors all at once.

    Args:
        centres: ``[lists, dimension]``.
        metric: how near a centre is.
        seed: of the groups; the same seed gives the same lists.
        threads: in which vectors are compared.
    """

    def __init__(self, centres: Vectors, metric: Metric, seed: int, threads: int = 1) -> None:
        self._centres, self._threads = centres, threads
        self._metric: Metric = metric
        self._groups: list[Lists] = []
        if len(centres) >= _GROUPED_FROM:
            heads = round(math.sqrt(len(centres)))
            # In one thread: whoever goes on with a build may have another number of them, and needs the same groups.
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
    """faiss compares in the calling thread alone from now on: several of its own had to wait for what lies between two calls."""
    import faiss

    faiss.omp_set_num_threads(1)


def _nearest_of(vectors: Vectors, centres: Vectors, count: int, metric: Metric) -> tuple[Vectors, Lists]:
    """Of each vector the distances to the nearest centres, the smaller the nearer, and which they are; ``[vectors, count]``."""
    import faiss

    distances, places = faiss.knn(vectors, centres, count, metric=faiss_metric(metric))
    return (-distances if metric == "ip" else distances), places


def faiss_metric(metric: Metric) -> int:
    """Of vectors as they are kept: those for ``"cosine"`` have length 1, so that the nearest by distance are the nearest."""
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

"""The inverted lists of an index: where their centres lie, and how a vector finds its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.sources.base import Metric

if TYPE_CHECKING:
    import faiss

MOST_LISTS = 65_536
SAMPLE_A_LIST = 40
"""Vectors that a centre is learnt from, on average; faiss advises 39 at least."""
MOST_SAMPLED = 500_000
"""1.5 GB as float32 at 768 dimensions."""
_ITERATIONS = 8
_SEARCHED_FROM = 1_024
"""Lists from which a graph finds the nearest: it compares some 500 centres, and loses every fortieth vector to a list nearly as
near."""
_NEIGHBOURS = 32
_ADDING_SEARCH = 8
"""Centres that the graph keeps in view for each vector that is put in: 16,600 vectors/s among 36,000 lists, 95 % into the nearest
one; 32 take 2.4 times as long for 98.8 %."""


def lists_for(count: int) -> int:
    """Lists for so many passages: 8 for each square root, of 64 passages at least.

    A list that is probed costs as much as some 450 codes in it, and finer lists leave fewer codes to compare: of a million real and
    extended vectors, the three nearest of 95 % of questions stood in 8.2 % of all codes with 4,000 lists, in 1.2 % with 16,000.
    """
    return max(1, min(int(8 * math.sqrt(count)), count // 64, MOST_LISTS))


def sample_size(count: int, lists: int) -> int:
    """Vectors to learn the centres from."""
    return min(count, max(SAMPLE_A_LIST * lists, 10_000), MOST_SAMPLED)


def learn_centres(sample: Vectors, lists: int, seed: int) -> Vectors:
    """Centres ``[lists, dimension]`` of the sample, by k-means in two steps: first coarse clusters, then each by itself.

    One step of k-means with 16,384 centres compares each vector with all of them, a thousand seconds on two cores; two steps
    take 17. The same sample, seed and number of threads give the same centres.

    Args:
        sample: ``[vectors, dimension]``, at least as many as lists.
        lists: how many.
        seed: of the first centres.
    """
    coarse = max(1, round(math.sqrt(lists)))
    if lists <= 256 or len(sample) < 4 * lists:
        return _clusters(sample, lists, seed)
    first = _clusters(sample[: 512 * coarse], coarse, seed)
    nearest = _exact(first).search(sample, 1)[1][:, 0]
    shares = shared_out(lists, np.bincount(nearest, minlength=coarse).tolist())
    # One part at a time: all at once would be the sample a second time.
    found = [_clusters(sample[nearest == part], share, seed) for part, share in enumerate(shares) if share]
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


def quantiser_of(centres: Vectors, metric: Metric) -> Any:
    """What finds the lists nearest to a vector: faiss's flat index, or where lists are many its graph (HNSW)."""
    import faiss

    if len(centres) < _SEARCHED_FROM:
        return _exact(centres, metric)
    graph = faiss.IndexHNSWFlat(centres.shape[1], _NEIGHBOURS, faiss_metric(metric))
    graph.hnsw.efConstruction = 100
    graph.hnsw.efSearch = _ADDING_SEARCH
    # In one thread: in several the graph comes out differently each time.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        graph.add(centres)
    finally:
        faiss.omp_set_num_threads(threads)
    return graph


def faiss_metric(metric: Metric) -> int:
    """Of vectors as they are kept: those for ``"cosine"`` have length 1, so that the nearest by distance are the nearest."""
    import faiss

    return faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2


def _clusters(sample: Vectors, count: int, seed: int) -> Vectors:
    import faiss

    if count >= len(sample):
        return np.concatenate([sample, np.repeat(sample[-1:], count - len(sample), axis=0)])
    clustering = faiss.Kmeans(
        sample.shape[1], count, niter=_ITERATIONS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=512
    )
    clustering.train(np.ascontiguousarray(sample))
    centres: Any = clustering.centroids
    return centres


def _exact(centres: Vectors, metric: Metric = "l2") -> faiss.IndexFlat:
    import faiss

    flat = faiss.IndexFlat(centres.shape[1], faiss_metric(metric))
    flat.add(np.ascontiguousarray(centres))
    return flat

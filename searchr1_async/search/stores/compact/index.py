"""Search in a compact index: nearest by codes, re-ranked by full vectors. Blocking; call it in worker threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.waits import prepared_ahead
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric
from searchr1_async.search.stores.compact.codes import Codes
from searchr1_async.search.stores.compact.probing import Probing, squared_lengths
from searchr1_async.search.stores.compact.vector_file import Rows, VectorFile


@dataclass(frozen=True, slots=True)
class Ranked:
    """The nearest rows of some queries, nearest first."""

    rows: Rows
    """``[queries, results]``, padded with -1."""
    scores: NDArray[np.float32]
    """``[queries, results]``, from :func:`similarities`."""


def ready_vectors(vectors: Vectors, metric: Metric) -> Vectors:
    """Vectors as stored and searched: float32, normalised for ``"cosine"`` (zero vectors stay zero)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "cosine":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (vectors / lengths).astype(np.float32, copy=False)


def are_usable(vectors: Vectors) -> NDArray[np.bool_]:
    """Whether each vector's values and its squared float32 length are finite, ``[n]``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(squared_lengths(np.asarray(vectors, np.float32)))


def similarities(products: Vectors, lengths: Vectors, own_lengths: Vectors, metric: Metric) -> Vectors:
    """Ranking scores, as the Chroma stores define them: the inner product, or ``1 - d / 2`` of the squared distance d for ``"l2"``.

    Args:
        products: inner products, ``[queries, candidates]``.
        lengths: squared lengths of the candidates, ``[queries, candidates]``.
        own_lengths: squared lengths of the queries, ``[queries, 1]``.
        metric: the index's metric.
    """
    if metric != "l2":
        return products
    return (1 - (own_lengths + lengths - 2 * products) / 2).astype(np.float32, copy=False)


def rank(queries: Vectors, candidates: Rows, vectors: VectorFile, metric: Metric, n_results: int) -> Ranked:
    """Ranks candidates by their full vectors.

    Args:
        queries: ``[queries, dimension]``, from :func:`ready_vectors`.
        candidates: rows, ``[queries, candidates]``, padded with -1.
        vectors: the index's vectors.
        metric: the index's metric.
        n_results: results to return.
    """
    products, lengths = vectors.products(queries, np.maximum(candidates, 0))
    scores = similarities(products, lengths, squared_lengths(queries)[:, None], metric)
    scores[candidates < 0] = -np.inf
    # Ties are broken by row, so the order does not depend on how candidates were found.
    order = np.lexsort((candidates, -scores), axis=1)[:, :n_results]
    return Ranked(np.take_along_axis(candidates, order, 1), np.take_along_axis(scores, order, 1))


class CompactIndex:
    """Codes and vectors of an index."""

    def __init__(self, codes: Codes, vectors: VectorFile, metric: Metric) -> None:
        self._codes, self._vectors = codes, vectors
        self._metric: Metric = metric

    @property
    def mean_list(self) -> float:
        """Mean codes per list."""
        return self._codes.count / len(self._codes.list_sizes())

    def gaps(self, queries: Vectors) -> Vectors:
        """How much farther each list is than the nearest, ``[queries, lists]``."""
        return self._codes.gaps(queries)

    def candidates(self, queries: Vectors, candidates: int, probing: Probing) -> Rows:
        """The nearest rows by their codes. Call from one thread only."""
        return self._codes.search(queries, min(candidates, self._codes.count), probing)

    def rank(self, queries: Vectors, candidates: Rows, n_results: int) -> Ranked:
        """See :func:`rank`. Thread-safe."""
        return rank(queries, candidates, self._vectors, self._metric, n_results)


def exact_nearest(
    queries: Vectors,
    vectors: VectorFile,
    metric: Metric,
    n_results: int,
    own_rows: Rows | None = None,
    advance: Callable[[int], None] | None = None,
) -> Rows:
    """The exact nearest rows, ``[queries, n_results]``, by brute force.

    Args:
        queries: ``[queries, dimension]``, from :func:`ready_vectors`.
        vectors: the index's vectors.
        metric: the index's metric.
        n_results: results per query.
        own_rows: ``[queries]``, a row to exclude per query, if any.
        advance: called with the rows compared so far.
    """
    import faiss

    rows = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    kind, sign = (faiss.METRIC_L2, -1) if metric == "l2" else (faiss.METRIC_INNER_PRODUCT, 1)
    beside = 0 if own_rows is None else 1
    for first, slab in prepared_ahead(vectors.slabs()):
        found, places = faiss.knn(queries, slab, min(n_results + beside, len(slab)), metric=kind)
        found, places = sign * found, places + first
        if own_rows is not None:
            found[places == own_rows[:, None]] = -np.inf
        rows, scores = np.concatenate([rows, places], axis=1), np.concatenate([scores, found], axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :n_results]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        if advance is not None:
            advance(first + len(slab))
    return rows

"""The codes of an index: 1 bit per dimension (RaBitQ, Gao and Long 2024) in inverted lists, searched by faiss.

A query searches the lists whose centre is hardly farther than the nearest one (as SPANN, Chen et al. 2021): hard questions have more
of them, so a distance margin compares fewer codes for the same recall than a fixed number of lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import replacing, write_atomically
from searchr1_async.errors import StoreError
from searchr1_async.search.compact.files import CODES_NAME, LISTS_NAME, SIZES_NAME, Rows
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import Metric

Lists = NDArray[np.int64]
"""List numbers, from 0."""
MOST_OF_MEAN = 4
"""Maximum lists per query, as a multiple of the mean."""
MOST_LISTS = 65_536
MOST_SAMPLED = 500_000  # 1.5 GB as float32 at 768 dimensions
_GROUPED_FROM = 1_024
"""From this many lists, a vector is compared with the centres of the nearest groups only, a twelfth of all."""
_COMPARED_TOGETHER = 8_192
"""Vectors per thread task; fixed, so that the assignment does not depend on the number of threads."""
SEED = 1
"""Of samples and clusters."""
_CONVERTED_CODES = 1 << 20
"""Codes repacked at a time; repacking 21 million at once takes 2.5 GB."""
_ALIGNED = 64
"""Lists start at a multiple of this many bytes, a cache line."""


@dataclass(frozen=True, slots=True)
class Probing:
    margin: float | None
    """Lists with a gap (see :func:`centre_distances`) up to this are searched; None: no limit."""
    most: int
    """Maximum number of lists, nearest first."""


def squared_lengths(vectors: Vectors) -> Vectors:
    """Squared lengths of vectors ``[n, dimension]``."""
    return np.einsum("vd,vd->v", vectors, vectors)


def centre_distances(queries: Vectors, centres: Vectors, lengths: Vectors, metric: Metric) -> tuple[Vectors, Vectors]:
    """faiss's distances, and gaps: how much farther each centre is than the nearest. Both ``[queries, lists]``.

    Distances are inner products for ``"ip"``, squared L2 otherwise. ``lengths``: squared, of the centres.
    """
    products, own = queries @ centres.T, squared_lengths(queries)[:, None]
    if metric == "ip":
        own[own == 0] = 1
        return products, (products.max(axis=1, keepdims=True) - products) / np.sqrt(own)  # a longer query is not nearer
    products *= -2
    products += own
    products += lengths
    return products, products - products.min(axis=1, keepdims=True)


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
    """The margin with which queries search ``mean`` lists on average and at most ``most``; None if that is not more.

    ``gap`` is ``[queries, lists]``, rows ascending.
    """
    if most <= mean:
        return None
    within = gap[:, :most].ravel()
    place = min(mean * len(gap), within.size) - 1
    return float(np.partition(within, place)[place])


def alike(counts: Sequence[int]) -> list[Lists]:
    """Groups of queries to search in one call each: up to 16 lists, then up to 1.4 times as many each, since fewer are padded."""
    levels = np.ceil(2 * np.log2(np.maximum(counts, 16)))
    return [np.flatnonzero(levels == level) for level in np.unique(levels)]


def lists_for(count: int) -> int:
    """Default number of lists: ``8 * sqrt(count)``, with at least 64 passages each."""
    return max(1, min(int(8 * math.sqrt(count)), count // 64, MOST_LISTS))


def sample_size(count: int, lists: int) -> int:
    """Vectors to learn the centres from; faiss advises at least 39 for each."""
    return min(count, max(40 * lists, 10_000), MOST_SAMPLED)


def learn_centres(sample: Vectors, lists: int, check: Callable[[], object] = lambda: None) -> Vectors:
    """Centres ``[lists, dimension]`` of ``sample[n >= lists, dimension]``, by k-means in two levels: coarse clusters, then each by itself.

    Deterministic for a sample and thread count. ``check`` is called between clusters and may raise to abort.
    """
    coarse = max(1, round(math.sqrt(lists)))
    if lists <= 256 or len(sample) < 4 * lists:
        return _clusters(sample, lists)
    nearest = _nearest_of(sample, _clusters(sample[: 512 * coarse], coarse), 1, "l2")[1][:, 0]
    # Rounded as sums, so that the shares sum to the number of lists.
    ends = np.cumsum(np.bincount(nearest, minlength=coarse)) * lists // len(sample)
    found: list[Vectors] = []
    for part, share in enumerate(np.diff(ends, prepend=0).tolist()):
        check()
        if share:
            found.append(_clusters(sample[nearest == part], share))
    return np.concatenate(found)


class ListAssigner:
    """Assigns vectors to the list with the nearest centre, or nearly; ``centres`` are ``[lists, dimension]``.

    Many centres are grouped, and a vector is compared only with those of its nearest groups.
    """

    def __init__(self, centres: Vectors, metric: Metric, threads: int = 1) -> None:
        self._threads = threads
        self._metric: Metric = metric
        self._heads, own = centres[:1], np.zeros(len(centres), np.int64)  # one group
        if len(centres) >= _GROUPED_FROM:
            with ThreadPoolExecutor(1, "searchr1-lists", _in_one_thread) as alone:
                heads = alone.submit(_clusters, centres, round(math.sqrt(len(centres))), len(centres)).result()
            used, own = np.unique(_nearest_of(centres, heads, 1, "l2")[1][:, 0], return_inverse=True)
            self._heads = heads[used]
        members = [np.flatnonzero(own == group) for group in range(len(self._heads))]
        self._groups = [(lists, centres[lists]) for lists in members]

    def nearest(self, vectors: Vectors) -> Lists:
        """The list of each vector, ``[vectors]``."""
        parts = np.split(vectors, range(_COMPARED_TOGETHER, len(vectors), _COMPARED_TOGETHER))
        with ThreadPoolExecutor(self._threads, "searchr1-lists", _in_one_thread) as pool:
            return np.concatenate([*pool.map(self._nearest, parts)])

    def _nearest(self, vectors: Vectors) -> Lists:
        compared = min(len(self._groups), max(8, math.ceil(len(self._groups) / 12)))
        near = _nearest_of(vectors, self._heads, compared, self._metric)[1]
        best, lists = np.full(len(vectors), np.inf, np.float32), np.zeros(len(vectors), np.int64)
        for group, (own, centres) in enumerate(self._groups):
            if len(here := np.flatnonzero((near == group).any(axis=1))):
                distances, places = _nearest_of(vectors[here], centres, 1, self._metric)
                nearer = distances[:, 0] < best[here]
                best[here[nearer]], lists[here[nearer]] = distances[nearer, 0], own[places[nearer, 0]]
        return lists


def _in_one_thread() -> None:
    """Makes faiss use only the calling thread; its own threads would idle between calls."""
    _faiss().omp_set_num_threads(1)


def _nearest_of(vectors: Vectors, centres: Vectors, count: int, metric: Metric) -> tuple[Vectors, Lists]:
    """Distances (smaller is nearer) and places of the nearest centres, both ``[n, count]``."""
    distances, places = _faiss().knn(vectors, centres, count, metric=faiss_metric(metric))
    return (-distances if metric == "ip" else distances), places


def faiss_metric(metric: Metric) -> int:
    """For vectors as stored: cosine vectors have length 1, so L2 gives the same order."""
    return _faiss().METRIC_INNER_PRODUCT if metric == "ip" else _faiss().METRIC_L2


def _clusters(sample: Vectors, count: int, per_cluster: int = 512) -> Vectors:
    if count >= len(sample):
        return np.concatenate([sample, np.repeat(sample[-1:], count - len(sample), axis=0)])
    bounds = {"min_points_per_centroid": 1, "max_points_per_centroid": per_cluster}
    clustering = _faiss().Kmeans(sample.shape[1], count, niter=8, seed=SEED, **bounds)
    clustering.train(np.ascontiguousarray(sample))
    return clustering.centroids


class Encoder:
    """Makes codes of vectors, and the files of an index of them; ``centres`` of its lists: ``[lists, dimension]``."""

    def __init__(self, centres: Vectors, metric: Metric) -> None:
        made = _faiss()
        lists, dimension = centres.shape
        self._quantiser = made.IndexFlat(dimension, faiss_metric(metric))
        self._quantiser.add(np.ascontiguousarray(centres))
        self._shape = (self._quantiser, dimension, lists, faiss_metric(metric))
        self._index = made.IndexIVFRaBitQ(*self._shape)
        self._index.train(centres)  # required by faiss; learns nothing more
        self.code_size: int = self._index.code_size

    def encode(self, vectors: Vectors, lists: Lists) -> NDArray[np.uint8]:
        """The codes ``[n, code_size]`` of contiguous vectors ``[n, dimension]`` in these lists ``[n]``."""
        swig = _faiss().swig_ptr
        codes = np.empty((len(vectors), self.code_size), np.uint8)
        self._index.encode_vectors(len(vectors), swig(vectors), swig(lists), swig(codes))
        return codes

    def write(self, codes: NDArray[np.uint8], lists: NDArray[np.integer], folder: Path) -> None:
        """Writes the codes and lists of all rows in the layout they are searched in, blocks of 32 per list; :data:`CODES_NAME` last."""
        made, sizes = _faiss(), np.bincount(lists, minlength=self._shape[2])
        rows = np.split(np.argsort(lists, kind="stable"), np.cumsum(sizes)[:-1])
        parts = np.where(sizes, np.cumsum(sizes) // _CONVERTED_CODES, -1)
        with replacing(folder / LISTS_NAME) as path, path.open("wb") as file:
            for part in np.unique(parts[parts >= 0]):
                numbers = np.flatnonzero(parts == part)
                index = self._side_by_side(numbers, rows, codes)
                packed = made.downcast_InvertedLists(index.invlists)
                for number, size in zip(numbers.tolist(), _code_bytes(sizes[numbers], index).tolist(), strict=True):
                    file.write(made.rev_swig_ptr(packed.get_codes(number), size).tobytes())
                    file.write(rows[number].astype("<i8").tobytes())
                    file.write(bytes(-file.tell() % _ALIGNED))
        write_atomically(folder / SIZES_NAME, sizes.astype("<i8").tobytes())
        empty = made.IndexIVFRaBitQFastScan(*self._shape)
        empty.qb, empty.is_trained = 8, True  # bits of a query per dimension
        with replacing(folder / CODES_NAME) as path:
            try:
                made.write_index(empty, str(path))
            except RuntimeError as error:  # how faiss reports a full disk
                raise OSError(f"faiss cannot write {folder / CODES_NAME}: {error}") from error

    def _side_by_side(self, lists: Lists, rows: Sequence[Rows], codes: NDArray[np.uint8]) -> Any:
        """An index of these lists alone, same numbers, in faiss's fast-scan layout."""
        made = _faiss()
        part = made.IndexIVFRaBitQ(*self._shape)
        part.is_trained = True
        for number in lists.tolist():
            ids, own = np.ascontiguousarray(rows[number], np.int64), np.ascontiguousarray(codes[rows[number]])
            part.invlists.add_entries(number, len(ids), made.swig_ptr(ids), made.swig_ptr(own))
        part.ntotal = part.invlists.compute_ntotal()
        return made.IndexIVFRaBitQFastScan(part)


def _code_bytes(sizes: NDArray[np.int64], index: Any) -> NDArray[np.int64]:
    """Bytes of each list's codes: blocks of 32, the last one padded."""
    return -(-sizes // index.bbs) * index.bbs * index.code_size


class Codes:
    """The codes in an index folder, memory-mapped and so shared between processes; ``threads`` are faiss's. Call it from one thread only.

    Raises StoreError if the files were not written by :meth:`Encoder.write`.
    """

    def __init__(self, folder: Path, threads: int, metric: Metric) -> None:
        made, path = _faiss(), folder / CODES_NAME
        self._threads = threads
        self._metric: Metric = metric
        try:
            index = self._index = made.read_index(str(path), made.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise StoreError(f"{path} is not a faiss index ({error})", is_fatal=True) from error
        self.list_sizes = np.fromfile(folder / SIZES_NAME, "<i8")
        self.count, self.dimension = int(self.list_sizes.sum()), int(index.d)
        self._lists = _mapped_lists(index, folder / LISTS_NAME, self.list_sizes)
        index.replace_invlists(self._lists, False)
        index.ntotal = self.count
        flat = made.downcast_index(index.quantizer)
        # Copied: centres are unaligned in the mapped file, and NumPy would copy them at every search.
        centres = np.array(made.rev_swig_ptr(flat.get_xb(), index.nlist * index.d), np.float32)
        self._centres: Vectors = centres.reshape(index.nlist, index.d)
        self._lengths = squared_lengths(self._centres)

    def distances(self, vectors: Vectors) -> tuple[Vectors, Vectors]:
        """:func:`centre_distances` of its centres."""
        return centre_distances(vectors, self._centres, self._lengths, self._metric)

    def search(self, vectors: Vectors, candidates: int, probing: Probing) -> Rows:
        """The nearest rows by their codes, ``[n, candidates]``; padded with -1 when the probed lists hold fewer."""
        _faiss().omp_set_num_threads(self._threads)  # applies to the calling thread only
        vectors = np.ascontiguousarray(vectors)
        distances, gap = self.distances(vectors)
        lists = chosen_lists(gap, probing)
        found = np.empty((len(vectors), candidates), np.int64)
        for group in alike([len(own) for own in lists]):
            most = max(len(lists[query]) for query in group)
            numbers, near = np.full((len(group), most), -1, np.int64), np.zeros((len(group), most), np.float32)
            for place, query in enumerate(group):
                own = lists[query]
                numbers[place, : len(own)], near[place, : len(own)] = own, distances[query, own]  # -1 pads
            self._index.nprobe = most
            found[group] = self._index.search_preassigned(vectors[group], candidates, numbers, near)[1]
        return found


def _mapped_lists(index: Any, path: Path, sizes: NDArray[np.int64]) -> Any:
    """faiss's on-disk lists, mapped from our own file; of its own, faiss would give each process a copy."""
    codes = _code_bytes(sizes, index)
    ends = np.cumsum(-(-(codes + 8 * sizes) // _ALIGNED) * _ALIGNED)
    if len(sizes) != index.nlist or path.stat().st_size != ends[-1]:
        raise StoreError(f"{path} does not belong to this index: copy the whole folder again", is_fatal=True)
    made = _faiss()
    lists, record = made.OnDiskInvertedLists(), made.OnDiskOneList()
    lists.nlist, lists.code_size, lists.read_only = index.nlist, index.code_size, True
    lists.filename, lists.totsize, lists.prefetch_nthread = str(path), int(ends[-1]), 0
    for row in np.stack([sizes, codes // index.code_size, np.r_[0, ends[:-1]]], axis=1).tolist():
        record.size, record.capacity, record.offset = row
        lists.lists.push_back(record)  # a copy
    if ends[-1]:
        lists.do_mmap()
    return lists


def _faiss() -> Any:
    """Untyped, because faiss's wrappers have no types; imported late, because it takes long."""
    import faiss

    return faiss

"""The codes of an index: 1 bit per dimension (RaBitQ, Gao and Long 2024) in inverted lists, searched by faiss.

Which inverted lists a query searches: those whose centre is hardly farther than the nearest one. Does not use faiss.

Easy questions have few centres near them, hard ones many, so a distance margin compares fewer codes for the same recall than a fixed
number of lists (SPANN, Chen et al. 2021, prunes lists the same way).

Inverted lists of an index: learning their centres, and assigning vectors to them.
"""

from __future__ import annotations

import ctypes
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


_QUERY_BITS = 8
"""Query bits per dimension while codes are compared."""
_CONVERTED_CODES = 1 << 20
"""Codes repacked at a time; repacking 21 million at once takes 2.5 GB."""
_ALIGNED = 64
"""Lists start at a multiple of this many bytes, a cache line."""


def empty_codes(centres: Vectors, metric: Metric) -> Any:
    """An empty faiss index with these lists, for :func:`add_codes`.

    Args:
        centres: ``[lists, dimension]``.
        metric: distance metric.
    """
    import faiss

    lists, dimension = centres.shape
    quantiser = faiss.IndexFlat(dimension, faiss_metric(metric))
    quantiser.add(np.ascontiguousarray(centres))
    index = faiss.IndexIVFRaBitQ(quantiser, dimension, lists, faiss_metric(metric))
    index.train(centres)  # required by faiss; learns nothing more
    return index


def add_codes(index: Any, vectors: Vectors, lists: Lists) -> None:
    """Adds vectors to lists.

    Args:
        index: from :func:`empty_codes`.
        vectors: ``[n, dimension]``.
        lists: ``[n]``, the list of each vector.
    """
    made = _faiss()
    vectors, lists = np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(lists, np.int64)
    index.add_core(len(vectors), made.swig_ptr(vectors), None, made.swig_ptr(lists))


def save_codes(index: Any, path: Path) -> None:
    """Writes the index atomically, in faiss's format.

    Raises:
        OSError: the file cannot be written.
    """
    import faiss

    with replacing(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # how faiss reports a full disk
            raise OSError(f"faiss cannot write {path}: {_first_line(error)}") from error


def load_codes(path: Path) -> Any:
    """Reads a file written by :func:`save_codes`.

    Raises:
        StoreError: faiss cannot read the file.
    """
    return _read_index(path, 0)


def write_codes(index: Any, folder: Path) -> None:
    """Writes the codes in the layout they are searched in (blocks of 32 per list); :data:`CODES_NAME` is written last.

    Args:
        index: filled by :func:`add_codes`.
        folder: index folder.

    Raises:
        OSError: the files cannot be written.
    """
    made = _faiss()
    sizes = np.array([index.invlists.list_size(number) for number in range(index.nlist)], np.int64)
    with replacing(folder / LISTS_NAME) as path, path.open("wb") as file:
        for part in _together(sizes):
            found = _side_by_side(index, part)
            lists = made.downcast_InvertedLists(found.invlists)
            for number, bytes_ in zip(part.tolist(), _code_bytes(sizes[part], found).tolist(), strict=True):
                file.write(made.rev_swig_ptr(lists.get_codes(number), bytes_).tobytes())
                file.write(made.rev_swig_ptr(lists.get_ids(number), int(sizes[number])).tobytes())
                file.write(bytes(-file.tell() % _ALIGNED))
    write_atomically(folder / SIZES_NAME, sizes.astype("<i8").tobytes())
    empty = made.IndexIVFRaBitQFastScan(index.quantizer, index.d, index.nlist, index.metric_type)
    empty.qb = _QUERY_BITS
    empty.is_trained = True
    save_codes(empty, folder / CODES_NAME)


def _together(sizes: NDArray[np.int64]) -> list[Lists]:
    """The non-empty lists in order, in parts of about ``_CONVERTED_CODES`` codes."""
    held = np.flatnonzero(sizes)
    begins = np.searchsorted(np.cumsum(sizes[held]), np.arange(0, sizes.sum(), _CONVERTED_CODES), side="right")
    return [part for part in np.split(held, np.unique(begins)) if len(part)]


def _side_by_side(index: Any, lists: Lists) -> Any:
    """An index of these lists alone, same numbers, in faiss's fast-scan layout."""
    made = _faiss()
    part = made.IndexIVFRaBitQ(index.quantizer, index.d, index.nlist, index.metric_type)
    part.is_trained = True
    own, kept = part.invlists, index.invlists
    for number in lists.tolist():
        own.add_entries(number, kept.list_size(number), kept.get_ids(number), kept.get_codes(number))
    part.ntotal = own.compute_ntotal()
    return made.IndexIVFRaBitQFastScan(part)


def _code_bytes(sizes: NDArray[np.int64], index: Any) -> NDArray[np.int64]:
    """Bytes of each list's codes: blocks of 32, the last one padded."""
    return -(-sizes // index.bbs) * index.bbs * index.code_size


def _read_index(path: Path, flags: int) -> Any:
    import faiss

    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise StoreError(f"{path} is not a faiss index ({_first_line(error)})", is_fatal=True) from error


class Codes:
    """The codes of an index, memory-mapped and so shared between processes. Call it from one thread only.

    Args:
        folder: index folder.
        threads: faiss threads for comparing codes; NumPy compares centres in its own threads.
        metric: the index's metric.

    Raises:
        StoreError: the files were not written by :func:`write_codes`.
    """

    def __init__(self, folder: Path, threads: int, metric: Metric) -> None:
        made = _faiss()
        self._threads = threads
        self._metric: Metric = metric
        index = self._index = _read_index(folder / CODES_NAME, made.IO_FLAG_MMAP_IFC)
        self._sizes = np.fromfile(folder / SIZES_NAME, "<i8")
        self._lists = _mapped_lists(index, folder / LISTS_NAME, self._sizes)
        index.replace_invlists(self._lists, False)
        index.ntotal = int(self._sizes.sum())
        flat = made.downcast_index(index.quantizer)
        # Copied: centres are unaligned in the mapped file, and NumPy would copy them at every search.
        self._centres: Vectors = np.array(made.rev_swig_ptr(flat.get_xb(), index.nlist * index.d), np.float32)
        self._centres = self._centres.reshape(index.nlist, index.d)
        self._lengths = squared_lengths(self._centres)

    @property
    def count(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self._index.d)

    def list_sizes(self) -> NDArray[np.int64]:
        """Codes per list."""
        return self._sizes

    def _distances(self, vectors: Vectors) -> Vectors:
        return centre_distances(vectors, self._centres, self._lengths, self._metric)

    def gaps(self, vectors: Vectors) -> Vectors:
        """See :func:`~searchr1_async.search.compact.codes.gaps`; ``[vectors, lists]``."""
        return gaps(self._distances(vectors), vectors, self._metric)

    def search(self, vectors: Vectors, candidates: int, probing: Probing) -> Rows:
        """The nearest rows by their codes, ``[n, candidates]``; padded with -1 when the probed lists hold fewer."""
        import faiss

        faiss.omp_set_num_threads(self._threads)  # applies to the calling thread only
        vectors = np.ascontiguousarray(vectors)
        distances = self._distances(vectors)
        lists = chosen_lists(gaps(distances, vectors, self._metric), probing)
        found = np.empty((len(vectors), candidates), np.int64)
        for group in alike([len(own) for own in lists]):
            most = len(lists[group[0]])
            # -1 pads.
            numbers, near = np.full((len(group), most), -1, np.int64), np.zeros((len(group), most), np.float32)
            for place, query in enumerate(group):
                own = lists[query]
                numbers[place, : len(own)], near[place, : len(own)] = own, distances[query, own]
            self._index.nprobe = most
            found[group] = self._index.search_preassigned(vectors[group], candidates, numbers, near)[1]
        return found


def _mapped_lists(index: Any, path: Path, sizes: NDArray[np.int64]) -> Any:
    """faiss's on-disk lists, mapped from our own file.

    faiss would read them from its own file into each process's memory: 2.6 GB for 21 million passages.
    """
    codes = _code_bytes(sizes, index)
    ends = np.cumsum(-(-(codes + 8 * sizes) // _ALIGNED) * _ALIGNED)
    if len(sizes) != index.nlist or path.stat().st_size != ends[-1]:
        raise StoreError(f"{path} does not belong to this index: copy the whole folder again", is_fatal=True)
    made = _faiss()
    lists = made.OnDiskInvertedLists()
    lists.nlist, lists.code_size, lists.read_only = index.nlist, index.code_size, True
    lists.filename, lists.totsize, lists.prefetch_nthread = str(path), int(ends[-1]), 0
    lists.lists.resize(index.nlist)
    # Per list: codes, capacity, byte offset.
    memory = (ctypes.c_size_t * (3 * index.nlist)).from_address(int(lists.lists.data().this))
    records = np.ctypeslib.as_array(memory).reshape(-1, 3)
    records[:, 0], records[:, 1], records[:, 2] = sizes, codes // index.code_size, np.r_[0, ends[:-1]]
    if ends[-1]:
        lists.do_mmap()
    return lists


def _faiss() -> Any:
    """Untyped, because faiss's wrappers have no types."""
    import faiss

    return faiss


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:200]

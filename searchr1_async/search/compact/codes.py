"""The codes of an index: 1 bit per dimension (RaBitQ, Gao and Long 2024) in inverted lists, searched by faiss."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import replacing, write_atomically
from searchr1_async.errors import StoreError
from searchr1_async.search.compact.files import Rows
from searchr1_async.search.compact.inverted_lists import (
    Lists,
    Probing,
    alike,
    centre_distances,
    chosen_lists,
    faiss_metric,
    gaps,
    squared_lengths,
)
from searchr1_async.search.compact.layout import CODES_NAME, LISTS_NAME, SIZES_NAME
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import Metric

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
        """See :func:`~searchr1_async.search.compact.inverted_lists.gaps`; ``[vectors, lists]``."""
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

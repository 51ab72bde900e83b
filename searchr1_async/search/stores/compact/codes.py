"""The codes of an index: a bit for each number of a vector, in inverted lists, searched by faiss (RaBitQ, Gao and Long 2024)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.errors import StoreError
from searchr1_async.files import sync_folder
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.sources.base import Metric
from searchr1_async.search.stores.compact.lists import faiss_metric
from searchr1_async.search.stores.compact.probing import Lists, Probing, alike, centre_distances, chosen_lists, gaps
from searchr1_async.search.stores.compact.vector_file import Rows

_QUERY_BITS = 8
"""Of each number of a query while codes are compared."""


def empty_codes(centres: Vectors, metric: Metric) -> Any:
    """A faiss index with these lists, to which :func:`add_codes` adds.

    Args:
        centres: ``[lists, dimension]``.
        metric: how near two vectors are.
    """
    import faiss

    lists, dimension = centres.shape
    quantiser = faiss.IndexFlat(dimension, faiss_metric(metric))
    quantiser.add(np.ascontiguousarray(centres))
    index = faiss.IndexIVFRaBitQ(quantiser, dimension, lists, faiss_metric(metric))
    index.train(centres)  # which learns nothing more from them
    return index


def add_codes(index: Any, vectors: Vectors, lists: Lists) -> None:
    """Puts vectors into lists.

    Args:
        index: of :func:`empty_codes`.
        vectors: ``[vectors, dimension]``.
        lists: ``[vectors]``.
    """
    import faiss

    made: Any = faiss  # its wrappers have no types
    vectors, lists = np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(lists, np.int64)
    index.add_core(len(vectors), made.swig_ptr(vectors), None, made.swig_ptr(lists))


def searched_codes(index: Any) -> Any:
    """The same codes in the order in which a search reads 32 of them at once; half a second for 200,000."""
    import faiss

    found: Any = faiss.IndexIVFRaBitQFastScan(index)
    found.qb = _QUERY_BITS
    found.referenced_objects = [index]  # whose centres it uses and does not own
    return found


def save_codes(index: Any, path: Path) -> None:
    """Writes faiss's own file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    import faiss

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # faiss's own words for a full disk
            raise OSError(f"faiss cannot write {path}: {_first_line(error)}") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load_codes(path: Path, *, mapped: bool) -> Any:
    """Reads them; mapped they stay in the file, and processes that search them share its memory.

    Raises:
        StoreError: faiss cannot read the file.
    """
    import faiss

    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise StoreError(f"{path} is no file that faiss reads ({_first_line(error)})", is_fatal=True) from error


class Codes:
    """The codes of an index.

    All calls come from one thread.

    Args:
        index: of :func:`load_codes` or :func:`searched_codes`.
        threads: of faiss in a search.
        metric: of the index.
    """

    def __init__(self, index: Any, threads: int, metric: Metric) -> None:
        import faiss

        self._index, self._threads = index, threads
        self._metric: Metric = metric
        made: Any = faiss
        flat = made.downcast_index(index.quantizer)
        # A copy, 113 MB for 21 million passages: in the mapped file they begin at any byte, and NumPy copied them at each search.
        self._centres: Vectors = np.array(made.rev_swig_ptr(flat.get_xb(), index.nlist * index.d), np.float32)
        self._centres = self._centres.reshape(index.nlist, index.d)

    @property
    def count(self) -> int:
        """Vectors in it."""
        return int(self._index.ntotal)

    def list_sizes(self) -> NDArray[np.int64]:
        """Codes in each list."""
        lists = self._index.invlists
        return np.array([lists.list_size(number) for number in range(self._index.nlist)])

    def gaps(self, vectors: Vectors) -> Vectors:
        """See :func:`~searchr1_async.search.stores.compact.probing.gaps`; ``[vectors, lists]``."""
        return gaps(centre_distances(vectors, self._centres, self._metric), vectors, self._metric)

    def search(self, vectors: Vectors, candidates: int, probing: Probing) -> Rows:
        """The rows nearest by their codes, ``[vectors, candidates]``; -1 where the lists looked through hold fewer."""
        import faiss

        faiss.omp_set_num_threads(self._threads)  # of the calling thread alone
        vectors = np.ascontiguousarray(vectors)
        distances = centre_distances(vectors, self._centres, self._metric)
        lists = chosen_lists(gaps(distances, vectors, self._metric), probing)
        found = np.empty((len(vectors), candidates), np.int64)
        for group in alike([len(own) for own in lists]):
            most = len(lists[group[0]])
            # -1 is no list.
            numbers, near = np.full((len(group), most), -1, np.int64), np.zeros((len(group), most), np.float32)
            for place, query in enumerate(group):
                own = lists[query]
                numbers[place, : len(own)], near[place, : len(own)] = own, distances[query, own]
            self._index.nprobe = most
            found[group] = self._index.search_preassigned(vectors[group], candidates, numbers, near)[1]
        return found


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:200]

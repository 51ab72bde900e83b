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
from searchr1_async.search.stores.compact.lists import faiss_metric, quantiser_of
from searchr1_async.search.stores.compact.vector_file import Rows

_QUERY_BITS = 8
"""Of each number of a query while codes are compared."""


def empty_codes(centres: Vectors, sample: Vectors, metric: Metric) -> Any:
    """A faiss index with these lists and no codes yet.

    Args:
        centres: ``[lists, dimension]``.
        sample: ``[vectors, dimension]``; faiss wants to see some.
        metric: how near two vectors are.
    """
    import faiss

    lists, dimension = centres.shape
    quantiser = quantiser_of(centres, metric)
    index = faiss.IndexIVFRaBitQFastScan(quantiser, dimension, lists, faiss_metric(metric))
    index.qb = _QUERY_BITS
    index.train(sample)
    return index


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
        index: of :func:`load_codes`.
        threads: of faiss in a search.
    """

    def __init__(self, index: Any, threads: int) -> None:
        self._index = index
        self._threads = threads

    @property
    def count(self) -> int:
        """Vectors in it."""
        return int(self._index.ntotal)

    def list_sizes(self) -> NDArray[np.int64]:
        """Codes in each list."""
        lists = self._index.invlists
        return np.array([lists.list_size(number) for number in range(self._index.nlist)])

    def search(self, vectors: Vectors, candidates: int, probes: int) -> Rows:
        """The rows nearest by their codes, ``[vectors, candidates]``; -1 where the lists that were probed hold fewer."""
        import faiss

        faiss.omp_set_num_threads(self._threads)  # of the calling thread alone
        made: Any = faiss  # its wrappers have no types
        # A graph returns no more lists than it keeps in view. The variable keeps it alive: faiss holds a bare pointer to it.
        graph = None
        if hasattr(made.downcast_index(self._index.quantizer), "hnsw"):
            graph = made.SearchParametersHNSW(efSearch=max(probes, 64))
        parameters = made.IVFRaBitQSearchParameters(nprobe=probes, qb=_QUERY_BITS, quantizer_params=graph)
        return self._index.search(np.ascontiguousarray(vectors), candidates, params=parameters)[1]


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:200]

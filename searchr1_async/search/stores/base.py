"""The vector store protocols used by the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeGuard

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders.base import Vectors

Metric = Literal["cosine", "l2", "ip"]
"""Distance metric, with Chroma's names: ``"cosine"``, squared L2 ``"l2"`` or inner product ``"ip"``."""

Found = tuple[tuple[Passage, ...], ...]
"""Passages per query, nearest first."""


class Store(Protocol):
    """A vector store. Each call sends one request and does not retry.

    The caller batches, paces, retries and sets deadlines; the store states its limits and classifies faults. Between ``open`` and
    ``aclose`` it is used from one event loop. A cancelled call must leave it usable.
    """

    @property
    def name(self) -> str:
        """Location for messages and logs; contains no secrets."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal as long as answers are: available once open, and changes when the collection is recreated."""
        ...

    @property
    def dimension(self) -> int | None:
        """Dimension of the vectors; None if not open, or empty."""
        ...

    @property
    def max_queries(self) -> int:
        """Maximum vectors per query."""
        ...

    @property
    def max_requests(self) -> int:
        """Maximum concurrent requests, an upper bound for pacing; 1 if the store serialises calls anyway."""
        ...

    async def open(self) -> None:
        """Connects. Does nothing if already open.

        Raises:
            PassingFault: the store does not respond now.
            StoreError: a permanent failure.
        """
        ...

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        """The ``n_results`` nearest passages of each vector, with similarities; fewer if the store holds fewer.

        Raises:
            PassingFault: worth a retry (see :mod:`searchr1_async.search.faults`).
            RefusedInput: caused by one of these vectors.
            StoreError: permanent; fatal if any other query would fail too.
        """
        ...

    async def count(self) -> int:
        """Number of passages.

        Raises:
            PassingFault: worth a retry.
            StoreError: permanent.
        """
        ...

    async def aclose(self) -> None:
        """Closes connections, files and threads. The store may be opened again."""
        ...


class WritableStore(Store, Protocol):
    """A store that accepts passages."""

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        """Adds passages, replacing those with the same id.

        Raises:
            PassingFault: worth a retry; some passages may have been added.
            StoreError: permanent.
        """
        ...

    async def missing(self, ids: Sequence[str]) -> frozenset[str]:
        """The ids that the store does not hold.

        Raises:
            PassingFault: worth a retry.
            StoreError: permanent.
        """
        ...


def is_writable(store: Store) -> TypeGuard[WritableStore]:
    """Whether passages can be added to it."""
    return callable(getattr(store, "add", None))

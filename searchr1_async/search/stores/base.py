"""What the search needs of a vector store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders.base import Vectors

Found = tuple[tuple[Passage, ...], ...]
"""For each query its passages, nearest first."""


class Store(Protocol):
    """Passages with their vectors. All its awaits are made from one event loop between ``open`` and ``aclose``."""

    @property
    def name(self) -> str:
        """Where it is, for people and logs; without any key."""
        ...

    @property
    def max_queries(self) -> int:
        """Vectors that one query may hold."""
        ...

    async def open(self) -> None:
        """Connects. Opening what is open does nothing.

        Raises:
            StoreError: it cannot.
        """
        ...

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        """The ``n_results`` nearest passages of each vector, with their similarity; fewer where the store holds fewer.

        Raises:
            StoreError: for good.
        """
        ...

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        """Puts passages in, replacing those with the same id.

        Raises:
            StoreError: for good.
        """
        ...

    async def count(self) -> int:
        """Passages it holds.

        Raises:
            StoreError: for good.
        """
        ...

    async def aclose(self) -> None:
        """Lets go of connections, files and threads; it may be opened again."""
        ...

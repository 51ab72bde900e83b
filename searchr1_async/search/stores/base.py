"""What the search needs of a vector store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeGuard

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders.base import Vectors

Metric = Literal["cosine", "l2", "ip"]
"""How near two vectors are: ``"cosine"``, squared distance ``"l2"``, or inner product ``"ip"``; Chroma's names."""

Found = tuple[tuple[Passage, ...], ...]
"""For each query its passages, nearest first."""


class Store(Protocol):
    """Passages with their vectors: one request a call, tried once.

    Batching, pacing, retrying and deadlines are the caller's: a store says how much it takes at once, and which kind of
    fault it met. All its awaits are made from one event loop between ``open`` and ``aclose``. A cancelled call must leave
    it usable.
    """

    @property
    def name(self) -> str:
        """Where it is, for people and logs; without any key."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal while it answers alike: known once it is open, another one when its collection was made anew."""
        ...

    @property
    def dimension(self) -> int | None:
        """Numbers a vector; None while it is not open, or empty."""
        ...

    @property
    def max_queries(self) -> int:
        """Vectors that one query may hold."""
        ...

    @property
    def max_requests(self) -> int:
        """Requests at once, at most: where pacing stops growing. 1 where calls queue behind one another anyway."""
        ...

    async def open(self) -> None:
        """Connects. Opening what is open does nothing.

        Raises:
            PassingFault: it does not answer now.
            StoreError: it cannot, for good.
        """
        ...

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        """The ``n_results`` nearest passages of each vector, with their similarity; fewer where the store holds fewer.

        Raises:
            PassingFault: this time; worth another try (see :mod:`searchr1_async.search.faults`).
            RefusedInput: because of one of these vectors.
            StoreError: for good; fatal where no other query would fare better.
        """
        ...

    async def count(self) -> int:
        """Passages it holds.

        Raises:
            PassingFault: this time.
            StoreError: for good.
        """
        ...

    async def aclose(self) -> None:
        """Lets go of connections, files and threads; it may be opened again."""
        ...


class WritableStore(Store, Protocol):
    """A store that passages can be put into."""

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        """Puts passages in, replacing those with the same id.

        Raises:
            PassingFault: this time; some of them may be in.
            StoreError: for good.
        """
        ...

    async def missing(self, ids: Sequence[str]) -> frozenset[str]:
        """Those of the ids that it does not hold.

        Raises:
            PassingFault: this time.
            StoreError: for good.
        """
        ...


def is_writable(store: Store) -> TypeGuard[WritableStore]:
    """Whether passages can be put into it."""
    return callable(getattr(store, "add", None))

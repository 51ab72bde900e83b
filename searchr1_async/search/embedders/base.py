"""What the search needs of an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""``[texts, dimension]``, float32; of length 1 where the embedder normalises."""


class Embedder(Protocol):
    """Turns texts into vectors, one request a call, tried once.

    Batching, pacing, retrying and deadlines are the caller's: an embedder says how much it takes at once, and which
    kind of fault it met. All its awaits are made from one event loop between ``open`` and ``aclose``. A cancelled call
    must leave it usable.
    """

    @property
    def name(self) -> str:
        """For people and logs."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for embedders whose vectors may be mixed in one index; known without opening anything heavy."""
        ...

    @property
    def max_texts(self) -> int:
        """Texts that one request may hold; may fall while it is open (a service that turns out to refuse lists)."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens that one request may hold in all; None where there is no such limit."""
        ...

    @property
    def max_requests(self) -> int:
        """Requests at once, at most: where pacing stops growing. 1 where calls queue behind one another anyway."""
        ...

    async def open(self) -> None:
        """Gets ready (loads the model, connects). Opening what is open does nothing.

        Raises:
            EmbeddingError: it cannot.
        """
        ...

    @property
    def dimension(self) -> int:
        """Numbers a vector; known once it is open."""
        ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """One vector a search query, in order.

        Raises:
            PassingFault: this time; worth another try (see :mod:`searchr1_async.search.faults`).
            RefusedInput: because of one of these texts.
            EmbeddingError: for good; fatal where no other text would fare better.
        """
        ...

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """One vector a passage, in order.

        Raises:
            PassingFault: this time; worth another try (see :mod:`searchr1_async.search.faults`).
            RefusedInput: because of one of these texts.
            EmbeddingError: for good; fatal where no other text would fare better.
        """
        ...

    async def aclose(self) -> None:
        """Lets go of connections and threads; it may be opened again."""
        ...

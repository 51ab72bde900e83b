"""What the search needs of an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""``[texts, dimension]``, float32, every row of length 1."""


class Embedder(Protocol):
    """Turns texts into vectors. All its awaits are made from one event loop between ``open`` and ``aclose``."""

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
        """Texts that one request may hold."""
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
            EmbeddingError: for good.
        """
        ...

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """One vector a passage, in order.

        Raises:
            EmbeddingError: for good.
        """
        ...

    async def aclose(self) -> None:
        """Lets go of connections and threads; it may be opened again."""
        ...

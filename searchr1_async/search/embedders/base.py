"""The embedder interface of the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""``[texts, dimension]``, float32; of unit length if the embedder normalizes."""


class Embedder(Protocol):
    """Turns texts into vectors, one request per call, tried once.

    The caller batches, paces, retries and applies deadlines; an embedder declares its limits and classifies faults. Between
    ``open`` and ``aclose`` all calls come from one event loop. It must stay usable after a cancelled call.
    """

    @property
    def name(self) -> str:
        """For people and logs."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for embedders whose vectors may share an index; available before ``open``."""
        ...

    @property
    def max_texts(self) -> int:
        """Texts per request; may shrink while open, if a service turns out to refuse lists."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Total tokens per request; None for no limit."""
        ...

    @property
    def max_requests(self) -> int:
        """Maximum concurrent requests; 1 if calls queue anyway."""
        ...

    async def open(self) -> None:
        """Loads the model or connects. Idempotent. Raises EmbeddingError."""
        ...

    @property
    def dimension(self) -> int:
        """Of the vectors; available once open."""
        ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """One vector per query, in order.

        Raises:
            PassingFault: transient, worth a retry (see :mod:`searchr1_async.search.faults`).
            RefusedInput: because of one of these texts.
            EmbeddingError: permanent; fatal if no other text would succeed.
        """
        ...

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """One vector per passage, in order. Raises as :meth:`embed_queries`."""
        ...

    async def aclose(self) -> None:
        """Releases connections and threads; may be reopened."""
        ...

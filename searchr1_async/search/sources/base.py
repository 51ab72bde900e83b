"""The source protocol of a compact index: passages with vectors, in a fixed order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric

Block = tuple[list[Passage], Vectors]
"""Passages and their vectors ``[passages, dimension]``, float32."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Facts of an open source."""

    name: str
    """For messages: the file or collection, and where it is."""
    fingerprint: str
    """Equal for equal passages and vectors; a build resumes only with the same fingerprint."""
    count: int
    """Number of passages, at least 1."""
    dimension: int
    """Dimension of the vectors."""
    metric: Metric
    embedder: str | None = None
    """Embedder of the vectors, as :func:`~searchr1_async.search.embedders.choice.make_embedder` accepts it; None if unknown."""
    embedder_fingerprint: str | None = None


@runtime_checkable
class VectorSource(Protocol):
    """Passages with vectors, readable from any row in bounded memory. Used from one event loop."""

    async def open(self) -> SourceFacts:
        """Opens the source. Does nothing but return the facts if already open.

        Raises:
            CorpusError: the passages cannot be used.
            EmbeddingError: the embedder cannot be opened.
            StoreError: the vectors cannot be read, or do not match the passages.
        """
        ...

    def blocks(self, start: int) -> AsyncIterator[Block]:
        """All rows from ``start`` (0-based) in order, in blocks of 1 to 8,192 rows.

        Raises:
            CorpusError, EmbeddingError, StoreError: a row cannot be read; earlier blocks remain valid.
        """
        ...

    async def kept(self, rows: int) -> None:
        """Called once the first ``rows`` rows are on disk in the index: data kept for them may be dropped."""
        ...

    async def aclose(self) -> None:
        """Closes files, connections and threads. May be opened again."""
        ...

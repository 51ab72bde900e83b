"""What a compact index is made of: passages with their vectors, in an order that never changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric

Block = tuple[list[Passage], Vectors]
"""Passages and their vectors ``[passages, dimension]``, float32, row by row."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What is known of a source once it is open."""

    name: str
    """For people: a file, a collection and where it is."""
    fingerprint: str
    """Equal for equal passages and vectors: a build goes on only with what it began with."""
    count: int
    """Passages, at least 1."""
    dimension: int
    """Numbers a vector."""
    metric: Metric
    embedder: str | None = None
    """What made the vectors, as :func:`~searchr1_async.search.embedders.choice.make_embedder` takes it; None where unknown."""
    embedder_fingerprint: str | None = None


@runtime_checkable
class VectorSource(Protocol):
    """Passages with their vectors, read in bounded memory, from any row on. All awaits come from one event loop."""

    async def open(self) -> SourceFacts:
        """Gets ready and says what there is. Opening what is open says it again.

        Raises:
            CorpusError: the passages cannot be used.
            EmbeddingError: the embedder cannot be opened.
            StoreError: the vectors cannot be read, or do not fit the passages.
        """
        ...

    def blocks(self, start: int) -> AsyncIterator[Block]:
        """All rows from number ``start`` (counted from 0) to the last, in their order; each block at least one row, at most 8,192.

        Raises:
            CorpusError, EmbeddingError, StoreError: a row cannot be had; what was given before stands.
        """
        ...

    async def kept(self, rows: int) -> None:
        """The rows before number ``rows`` are on disk in the index: whatever was remembered of them may go."""
        ...

    async def aclose(self) -> None:
        """Lets go of files, connections and threads; it may be opened again."""
        ...

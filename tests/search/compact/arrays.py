"""Vectors in memory as a source of a compact index, and vectors that lie in clusters as those of texts do."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.sources import Block, SourceFacts
from searchr1_async.search.stores.vector_store import Metric


class Arrays:
    """Vectors with passages that are made from their row; remembers where it was asked to begin."""

    def __init__(self, vectors: Vectors, metric: Metric = "cosine", *, name: str = "arrays", block: int = 500) -> None:
        self.vectors = vectors
        self.metric: Metric = metric
        self.name = name
        self.block = block
        self.claimed: int | None = None
        """Rows that it says it has; None: as many as it gives."""
        self.fails_at: int | None = None
        """Row at which it breaks."""
        self.begun_at: list[int] = []
        self.is_open = False

    async def open(self) -> SourceFacts:
        self.is_open = True
        return SourceFacts(
            self.name,
            f"{self.name}-{len(self.vectors)}",
            len(self.vectors) if self.claimed is None else self.claimed,
            self.vectors.shape[1],
            self.metric,
        )

    async def blocks(self, start: int) -> AsyncGenerator[Block, None]:
        self.begun_at.append(start)
        for first in range(start, len(self.vectors), self.block):
            part = self.vectors[first : first + self.block]
            if self.fails_at is not None and first + len(part) > self.fails_at:
                raise StoreError(f"{self.name} broke at row {self.fails_at}")
            yield [passage_of(first + place) for place in range(len(part))], np.asarray(part, np.float32)

    async def aclose(self) -> None:
        self.is_open = False


def passage_of(row: int) -> Passage:
    return Passage(str(row), f"Title {row}", f'Text of "{row}",\nin two lines, é')


def clustered(count: int, dimension: int = 64, *, seed: int = 0) -> Vectors:
    """Vectors in clusters of some 50, of lengths between 0.5 and 2."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(1, count // 50), dimension))
    vectors = centres[random.integers(len(centres), size=count)] + 0.6 * random.standard_normal((count, dimension))
    vectors *= random.uniform(0.5, 2, (count, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def scores_of(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float64]:
    """Of each query with each vector, in float64, by the definition of the metric."""
    ours, theirs = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return 1 - ((ours[:, None] - theirs[None]) ** 2).sum(axis=2) / 2
    if metric == "cosine":
        ours, theirs = (
            each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-30) for each in (ours, theirs)
        )
    return ours @ theirs.T


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

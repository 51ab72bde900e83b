"""Real vectors extended to any number of rows, so that what lies near a row looks as it does among the real ones.

The real rows come first. Every further row is

    x_i + l (x_j - x_i) + m (x_a - x_b),    scaled to length 1,

x_i any real row, x_j one of its nearest, (x_a, x_b) another row and one of that one's nearest, l even in [0, 1]. The first step
stays within the neighbourhood of x_i, the second leaves the line in a direction in which real neighbours differ. So rows get no
isotropic noise, which would have more dimensions than the data. What m is, and how near this comes, is measured by
benchmarks/compact_geometry.

Rows are drawn by (seed, block of 8,192): any of them can be made alone, in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from benchmarks.shared.real_vectors import RealVectors
from searchr1_async import Passage
from searchr1_async.search import Vectors
from searchr1_async.search.stores.sources import Block, SourceFacts

BLOCK_ROWS = 8192
NEIGHBOURS = 10
"""Nearest that x_j and x_b are drawn from."""
SPREAD = 1.0
"""m: see benchmarks/results/compact_geometry.md."""
_THREADS = 2
_PART = 256
"""Rows at a time in one thread: 0.8 MB, which stays in the processor's cache."""


def neighbours(vectors: Vectors, count: int = NEIGHBOURS) -> NDArray[np.int64]:
    """The nearest rows of each row, ``[rows, count]``, without itself."""
    import faiss

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    found = flat.search(vectors, count + 1)[1]
    own = found == np.arange(len(vectors))[:, None]
    own[~own.any(axis=1), -1] = True  # of equal rows another one came first
    return found[~own].reshape(len(vectors), count)


def kept_neighbours(vectors: Vectors, work: Path) -> NDArray[np.int64]:
    """Likewise, found once (a minute for 57,000 rows) and kept beside the vectors."""
    path = work / "real" / f"neighbours-{_digest(vectors)}.npy"
    if not path.exists():
        found = neighbours(vectors)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, found)
        temporary.replace(path)
    return np.load(path)


@dataclass(frozen=True)
class Extension:
    """Real rows, and how further ones are made of them."""

    vectors: Vectors
    """``[real rows, dimension]``, of length 1."""
    near: NDArray[np.int64]
    """``[real rows, neighbours]``."""
    spread: float = SPREAD
    seed: int = 1

    def block(self, number: int) -> tuple[NDArray[np.int64], Vectors]:
        """The rows from ``number * BLOCK_ROWS`` on: which real row each is near, and the vectors."""
        draw = np.random.default_rng([self.seed, number])
        real = len(self.vectors)
        first = number * BLOCK_ROWS
        base, other = draw.integers(0, real, (2, BLOCK_ROWS))
        to, away = draw.integers(0, self.near.shape[1], (2, BLOCK_ROWS))
        step = draw.random((BLOCK_ROWS, 1), dtype=np.float32)
        aim, from_ = self.near[base, to], self.near[other, away]
        out = np.empty((BLOCK_ROWS, self.vectors.shape[1]), np.float32)

        def fill(start: int) -> None:
            part = slice(start, start + _PART)
            rows, moved = out[part], self.vectors[aim[part]]
            np.take(self.vectors, base[part], axis=0, out=rows, mode="clip")
            moved -= rows
            moved *= step[part]
            rows += moved
            np.take(self.vectors, other[part], axis=0, out=moved, mode="clip")
            moved -= self.vectors[from_[part]]
            moved *= np.float32(self.spread)
            rows += moved
            rows /= np.sqrt(np.einsum("rd,rd->r", rows, rows))[:, None]

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(fill, range(0, BLOCK_ROWS, _PART)):
                pass
        held = min(max(real - first, 0), BLOCK_ROWS)
        out[:held] = self.vectors[first : first + held]
        base[:held] = np.arange(first, first + held)
        return base, out

    def blocks(self, rows: int, start: int = 0) -> Iterator[tuple[int, NDArray[np.int64], Vectors]]:
        """All rows from ``start`` on, block by block: the first row's number, what each is near, and the vectors."""
        for number in range(start // BLOCK_ROWS, -(-rows // BLOCK_ROWS)):
            first = number * BLOCK_ROWS
            base, vectors = self.block(number)
            chosen = slice(max(start - first, 0), min(rows - first, BLOCK_ROWS))
            yield first + (chosen.start or 0), base[chosen], vectors[chosen]


class ExtendedVectors:
    """A source of so many rows: the real ones, and those made of them, whose passages are the real ones' with a number.

    Args:
        real: passages and vectors.
        extension: of the same vectors.
        rows: in all.
        characters: of each passage's text; 21 million whole ones would take 14 GB of disk, 100 characters 4 GB.
    """

    def __init__(self, real: RealVectors, extension: Extension, rows: int, *, characters: int | None = 100) -> None:
        self._real, self._extension, self._rows = real, extension, rows
        self._texts = [(passage.title, passage.text[:characters].strip() or passage.title) for passage in real.passages]

    async def open(self) -> SourceFacts:
        extension = self._extension
        made = (_digest(extension.vectors), extension.spread, extension.seed, self._rows)
        return SourceFacts(
            name=f"{len(extension.vectors):,} real vectors extended to {self._rows:,}",
            fingerprint=hashlib.sha256(repr(made).encode() + repr(self._texts[:100]).encode()).hexdigest()[:32],
            count=self._rows,
            dimension=extension.vectors.shape[1],
            metric="cosine",
        )

    async def blocks(self, start: int) -> AsyncGenerator[Block]:
        rows = self._extension.blocks(self._rows, start)
        while (found := await anyio.to_thread.run_sync(next, rows, None)) is not None:
            first, base, vectors = found
            texts = self._texts
            yield (
                [
                    Passage(str(row), texts[near][0], f"{texts[near][1]} [{row}]")
                    for row, near in enumerate(base.tolist(), start=first)
                ],
                vectors,
            )

    async def aclose(self) -> None:
        """Nothing is open."""


def _digest(vectors: Vectors) -> str:
    return hashlib.blake2b(np.ascontiguousarray(vectors).tobytes(), digest_size=8).hexdigest()

"""The search that the benchmark serves, as a process of its own.

    python -m benchmarks.serving.service WORK EMBEDDER

Its one line of output is its address; it ends with its standard input.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread
import numpy as np

import searchr1_async as sr
from searchr1_async.search import Vectors, serve_search


class HashedWords:
    """A bag of words, each word at a place given by its hash."""

    name, fingerprint, dimension = "hashed words", "hashed-words-768", 768
    max_texts, max_requests = 1_000, 2

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, int(hashlib.md5(word.encode()).hexdigest()[:8], 16) % self.dimension] += 1
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self.embed_queries(texts)


def make_search(work: Path, embedder: str) -> sr.Search:
    """Over the built-in corpus, with nothing remembered."""
    chosen = HashedWords() if embedder == "hashed" else embedder
    return sr.Search.local("atlas", path=work / f"serving-{embedder}", embedder=chosen, cache_entries=0)


async def serve(work: Path, embedder: str) -> None:
    """Prints the address, and serves until standard input ends."""
    async with serve_search(make_search(work, embedder), port=0) as address:
        print(address, flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))

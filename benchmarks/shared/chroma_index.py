"""The Chroma server of the search benchmark: a folder of passages, put in once and kept, behind a `chroma run` process."""

from __future__ import annotations

import asyncio
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.shared.word_vectors import WordVectors

COLLECTION = "wiki_embeddings"
DIMENSION = 768
N_RESULTS = 3
_ADDED = 5_000


def build_index(folder: Path, passages: pl.DataFrame) -> None:
    """Puts the passages into a Chroma folder with Chroma's own settings, unless it holds as many already; takes minutes."""
    import chromadb
    from chromadb.config import Settings

    folder.mkdir(parents=True, exist_ok=True)
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    collection = client.get_or_create_collection(COLLECTION, embedding_function=None)
    vectors = WordVectors()
    began = time.monotonic()
    for start in range(collection.count(), passages.height, _ADDED):
        part = passages.slice(start, _ADDED)
        embeddings = np.stack([vectors.embed(text, DIMENSION) for text in part["text"]])
        columns: Any = {
            "ids": part["id"].to_list(),
            "documents": part["text"].to_list(),
            "metadatas": [{"title": title} for title in part["title"]],
            "embeddings": embeddings,
        }
        collection.add(**columns)
        print(f"{start + part.height:,} passages after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    client.close()  # pyright: ignore[reportAttributeAccessIssue]


@asynccontextmanager
async def chroma_server(folder: Path) -> AsyncIterator[int]:
    """`chroma run` over the folder: its port, once it has answered a query (the first one reads the index).

    Raises:
        RuntimeError: it did not come up within 2 minutes.
    """
    command = shutil.which("chroma", path=str(Path(sys.executable).parent)) or shutil.which("chroma")
    if command is None:
        raise RuntimeError("the command `chroma` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        command,
        *("run", "--path", str(folder), "--host", "127.0.0.1", "--port", str(port)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 120
        while True:
            try:
                await nearest(port, ["warm"])
                break
            except Exception as error:
                if process.returncode is not None or time.monotonic() > give_up:
                    raise RuntimeError("`chroma run` did not come up") from error
                await asyncio.sleep(0.2)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def nearest(port: int, queries: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The ids of each query's passages, asked for without any of the ways that are compared."""
    import chromadb

    vectors = WordVectors()
    client = await chromadb.AsyncHttpClient("127.0.0.1", port)
    collection = await client.get_collection(COLLECTION, embedding_function=None)
    found: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(queries), 100):
        part = queries[start : start + 100]
        embeddings = np.stack([vectors.embed(text, DIMENSION) for text in part])
        answer = await collection.query(query_embeddings=embeddings, n_results=N_RESULTS, include=[])  # pyright: ignore[reportArgumentType]
        found |= {query: tuple(ids) for query, ids in zip(part, answer["ids"], strict=True)}
    return found

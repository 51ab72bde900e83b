"""The search of tinker-cookbook's Search-R1 recipe, as a peer to measure against: written from its description.

Each search is one embedding request, one ``get_collection`` and one query, through Google's and Chroma's own clients. A
semaphore of 128 slots is held from the beginning to the end of a search, pauses after faults included. Every exception is
tried again, up to 10 times, after 1, 2, 4, 8 and then 10 seconds (75 s in all), except that of ``get_collection``; then
the error's text is the answer. Nothing is remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.genai import Client, types

Result = TypeVar("Result")

SLOTS = 128
RETRIES = 10
_MODEL = "gemini-embedding-001"
_DIMENSION = 768


class RecipeSearch:
    """One search at a time for each caller; ``async with`` connects.

    Args:
        gemini: Google's client.
        chroma_port: of the server on this machine.
        collection: its name.
        n_results: passages a search.
    """

    def __init__(self, gemini: Client, chroma_port: int, collection: str, n_results: int) -> None:
        self._gemini = gemini
        self._chroma_port = chroma_port
        self._collection = collection
        self._n_results = n_results
        self._slots = asyncio.Semaphore(SLOTS)
        self._chroma: Any = None
        self.store_requests = 0

    async def __aenter__(self) -> RecipeSearch:
        import chromadb

        self._chroma = await chromadb.AsyncHttpClient("127.0.0.1", self._chroma_port)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._gemini.aio.aclose()

    async def search(self, query: str) -> tuple[str, ...]:
        """The ids of the passages; the error's text where there is none."""
        async with self._slots:
            try:
                vector = await _retried(lambda: self._embed(query))
                self.store_requests += 1
                collection = await self._chroma.get_collection(self._collection, embedding_function=None)
                return await _retried(lambda: self._query(collection, vector))
            except Exception as error:
                return (str(error),)

    async def _embed(self, query: str) -> list[float]:
        config = types.EmbedContentConfig(task_type="RETRIEVAL_QUERY", output_dimensionality=_DIMENSION)
        answer = await self._gemini.aio.models.embed_content(model=_MODEL, contents=[query], config=config)
        assert answer.embeddings is not None
        values = answer.embeddings[0].values
        assert values is not None
        return values

    async def _query(self, collection: Any, vector: list[float]) -> tuple[str, ...]:
        self.store_requests += 1
        answer = await collection.query(query_embeddings=[vector], n_results=self._n_results)
        return tuple(answer["ids"][0])


async def _retried(action: Callable[[], Awaitable[Result]]) -> Result:
    for retry in range(RETRIES):
        try:
            return await action()
        except Exception:
            await asyncio.sleep(min(2**retry, 10))
    return await action()

"""Where the answers of an open search come from: memory, the disk cache, or the embedder and the store."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from pydantic import Field

from searchr1_async.boundary.settings import Count, Natural, Seconds, check_settings
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, SearchError, StoreError
from searchr1_async.search.cache import Answer, AnswerCache, AnswerKey, LeastRecentlyUsed
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.embedders import Vectors, checked_vectors
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.http_client import ServedSearch
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.retries import Capacity, Deadline
from searchr1_async.search.retrievers import OpenStore, Retriever
from searchr1_async.search.stats import SearchStatistics

MAX_BATCH = 128
"""Queries per request, unless the embedder or the store takes fewer. Larger batches gain nothing and delay the first query."""
VECTORS_KEPT = 4_096
"""Query vectors in memory (12 MB at 768 dimensions), for queries repeated while their lookup is pending."""


class SearchOptions(TypedDict, total=False):
    """Options of :class:`Search` besides embedder and store: see :class:`SearchSettings`."""

    n_results: int
    max_passage_words: int | None
    deadline: float
    cache_entries: int
    cache_path: str | Path | None
    cache_bytes: int
    pacing: PacingSettings


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Options of a search. Raises ConfigurationError if one is out of range."""

    n_results: Annotated[int, Field(ge=1, le=100)] = 3
    """Passages per query; three as in the recipe."""
    max_passage_words: Count | None = None
    """Truncates passages to so many words; None keeps them whole."""
    deadline: Seconds = 120.0
    """Seconds per call, then it fails. Extended while a service is down."""
    cache_entries: Natural = 10_000
    """Answers in memory (about 3 KB each); 0 disables the cache."""
    cache_path: str | Path | None = None
    """File of a persistent answer cache, which processes may share; None for none."""
    cache_bytes: Count = 1 << 30
    """Size of that file; drops the oldest answers."""
    pacing: PacingSettings = field(default_factory=PacingSettings)
    """Pacing and retries of requests to the embedder and the store."""

    def __post_init__(self) -> None:
        check_settings(self)


_Queried = tuple[AnswerKey, Vectors | None]
"""Answer key and query vector ``[dimension]``; None for a store that embeds queries itself."""
_Found = tuple[str, Answer]
"""An answer and the state of the index that gave it."""


class Lookup:
    """Finds the answers of an open search. A reopened search gets a new one, which inherits no outage and no rate limit."""

    def __init__(
        self,
        retriever: Retriever,
        store: OpenStore,
        settings: SearchSettings,
        answers: AnswerCache,
        tally: SearchStatistics,
    ) -> None:
        self._embedder, self._store = retriever.embedder, store
        self._embedder_fingerprint = retriever.embedder_fingerprint
        self._settings, self._answers, self._tally = settings, answers, tally
        self._vectors: LeastRecentlyUsed[str, Vectors] = LeastRecentlyUsed(VECTORS_KEPT)
        self._is_closed = False
        self._embedding: Dispatcher[str, str, Vectors] = Dispatcher(
            self._embed,
            name=retriever.embedder_name,
            capacity=self._embedder_capacity,
            pacing=settings.pacing,
            tally=tally.embedding,
            failure=EmbeddingError,
        )
        self._querying: Dispatcher[AnswerKey, _Queried, _Found] = Dispatcher(
            self._query,
            name=retriever.name,
            capacity=lambda: Capacity(min(MAX_BATCH, store.max_queries), store.max_requests),
            pacing=settings.pacing,
            tally=tally.querying,
            failure=StoreError,
        )

    @property
    def statistics(self) -> SearchStatistics:
        """The totals of the tally, with the current state of the services."""
        totals = self._tally.snapshot()
        totals.embedding, totals.querying = self._embedding.statistics, self._querying.statistics
        return totals

    def close(self) -> None:
        """Fails all pending calls."""
        self._is_closed = True
        self._embedding.close()
        self._querying.close()

    async def find(self, keys: Sequence[AnswerKey]) -> Mapping[AnswerKey, Answer]:
        """From memory, the file, or the services; caches what they return. Raises as ``Search.search``."""
        index = self._index()
        answers = self._answers.recall(index, keys)
        self._tally.memory_hits += sum(key in answers for key in keys)
        if missing := [key for key in keys if key not in answers]:
            kept = await self._answers.look_up(index, missing)
            self._tally.disk_hits += sum(key in kept for key in missing)
            answers |= kept
        if missing := [key for key in keys if key not in answers]:
            found = await self._ask_services(missing)
            await self._answers.keep(index, {key: answer for key, (state, answer) in found.items() if state == index})
            answers |= {key: answer for key, (_, answer) in found.items()}
        return answers

    async def _ask_services(self, keys: Sequence[AnswerKey]) -> dict[AnswerKey, _Found]:
        deadline = Deadline(self._settings.deadline)
        vectors: dict[str, Vectors] = {}
        if self._embedder is not None:
            known = {key.query: self._vectors.get(key.query) for key in keys}
            vectors = {text: vector for text, vector in known.items() if vector is not None}
            vectors |= await self._embedding.fetch({text: text for text in known if text not in vectors}, deadline)
        return await self._querying.fetch({key: (key, vectors.get(key.query)) for key in keys}, deadline)

    def _index(self) -> str:
        """Names the state of the index."""
        return f"query\0{self._embedder_fingerprint}\0{self._store.fingerprint}"

    # One request to each service, called by the dispatchers. Results are cached here, since others may ask for the same query
    # before the caller wakes up.

    async def _embed(self, texts: Sequence[str]) -> Sequence[Vectors]:
        embedder = self._embedder
        assert embedder is not None, "a store that embeds queries itself needs no embedder"
        # Copies: a view would keep the whole batch in memory.
        vectors = [row.copy() for row in checked_vectors(await embedder.embed_queries(texts), len(texts), embedder)]
        for text, vector in zip(texts, vectors, strict=True):
            self._vectors.put(text, vector)
        return vectors

    async def _query(self, queried: Sequence[_Queried]) -> Sequence[_Found]:
        if self._is_closed:
            raise SearchError("the search was closed while calls were waiting")
        store, state = self._store, self._index()
        most = max(key.n_results for key, _ in queried)
        if isinstance(store, ServedSearch):
            found = await store.search([key.query for key, _ in queried], most)
        else:
            found = await store.query(np.stack([vector for _, vector in queried if vector is not None]), most)
        if len(found) != len(queried):
            raise PassingFault(f"{store.name} answered {len(found)} of {len(queried)} queries", cause="malformed")
        answers = {
            key: trimmed(answer[: key.n_results], key.max_words)
            for answer, (key, _) in zip(found, queried, strict=True)
        }
        if self._is_closed or state != self._index():
            state = ""  # the collection was recreated during the request: it is unknown which one answered
        else:
            self._answers.remember(state, answers)
        return [(state, answer) for answer in answers.values()]

    def _embedder_capacity(self) -> Capacity:
        embedder = self._embedder
        if embedder is None:
            return Capacity(1, 1)
        return Capacity(min(MAX_BATCH, embedder.max_texts), embedder.max_requests)


def trimmed(passages: Sequence[Passage], max_words: int | None) -> Answer:
    """The passages, each cut to its first words."""
    if max_words is None:
        return tuple(passages)
    return tuple(replace(passage, text=first_words(passage.text, max_words)) for passage in passages)


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word, whitespace kept."""
    longer = re.match(rf"\s*+(?:\S++\s++){{{count - 1}}}\S++(?=\s+\S)", text)
    return longer[0] if longer else text

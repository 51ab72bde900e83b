"""Where the answers of an open search come from: memory, the disk cache, or the embedder and the store.

What is cached is what callers get: as many passages as were asked for, trimmed to their number of words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from searchr1_async.boundary.waits import OwnThread
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, SearchError, StoreError
from searchr1_async.search.cache import DiskCache, LeastRecentlyUsed, decode_passages, encode_passages
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.embedders import Embedder, Vectors, checked_vectors, estimated_tokens
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.gathering import Deadline
from searchr1_async.search.places import SearchSettings
from searchr1_async.search.retries import Capacity
from searchr1_async.search.stats import SearchStatistics, SearchTally
from searchr1_async.search.stores.vector_store import Store

MAX_BATCH = 128
"""Queries per request, unless the embedder or the store takes fewer. Larger batches gain nothing and delay the first query."""
VECTORS_KEPT = 4_096
"""Query vectors in memory (12 MB at 768 dimensions), for queries repeated while their lookup is pending."""

Answer = tuple[Passage, ...]

_Found = tuple[str | None, Answer]
"""An answer and the index state it is valid for; None if the index changed during the request."""


class AnswerKey(NamedTuple):
    """What an answer depends on besides the index."""

    query: str
    """Cleaned."""
    n_results: int
    max_words: int | None
    """Of each passage; None for whole passages."""


class AnswerCache:
    """Answers by key, each valid for one index state. ``max_entries`` bounds the LRU in memory (about 3 KB per answer of
    three passages), ``max_bytes`` the optional disk cache at ``path``, which processes may share.
    """

    def __init__(self, max_entries: int, path: Path | None = None, max_bytes: int = 1 << 30) -> None:
        self._memory: LeastRecentlyUsed[tuple[str, AnswerKey], Answer] = LeastRecentlyUsed(max_entries)
        self._disk = None if path is None else DiskCache(path, max_bytes=max_bytes)
        self._thread = OwnThread("searchr1-cache")

    @property
    def is_on_disk(self) -> bool:
        return self._disk is not None

    def recall(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from memory. ``index`` identifies everything an answer depends on besides its key."""
        found = {key: self._memory.get((index, key)) for key in keys}
        return {key: answer for key, answer in found.items() if answer is not None}

    def remember(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers in memory."""
        for key, answer in answers.items():
            self._memory.put((index, key), answer)

    async def look_up(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from disk, which are then also kept in memory."""
        if self._disk is None:
            return {}
        by_text = {_disk_key(key): key for key in keys}
        values = await self._thread.run(self._disk.get_many, index, list(by_text))
        decoded = {by_text[text]: decode_passages(value) for text, value in values.items()}
        found = {key: answer for key, answer in decoded.items() if answer is not None}
        self.remember(index, found)
        return found

    async def keep(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers on disk."""
        if self._disk is not None and answers:
            encoded = {_disk_key(key): encode_passages(answer) for key, answer in answers.items()}
            await self._thread.run(self._disk.put_many, index, encoded)

    async def aclose(self) -> None:
        """Releases the file and the thread; the memory cache stays."""
        if self._disk is not None:
            await self._thread.run(self._disk.close)
        self._thread.close()


def _disk_key(key: AnswerKey) -> str:
    return f"{key.n_results}\0{key.max_words or 0}\0{key.query}"


_Queried = tuple[AnswerKey, Vectors]
"""Answer key and query vector ``[dimension]``."""


class Lookup:
    """Finds the answers of a search from its opening to its closing.

    A reopened search gets a new one, so it does not inherit an outage or a rate limit.

    Args:
        embedder: open.
        store: open.
        source: name of the store, for messages.
        settings: of the search.
        answers: its cache.
        tally: its counters.
    """

    def __init__(
        self,
        embedder: Embedder,
        store: Store,
        source: str,
        settings: SearchSettings,
        answers: AnswerCache,
        tally: SearchTally,
    ) -> None:
        self._embedder, self._store = embedder, store
        self._settings, self._answers, self._tally = settings, answers, tally
        self._vectors: LeastRecentlyUsed[str, Vectors] = LeastRecentlyUsed(VECTORS_KEPT)
        self._is_closed = False
        self._embedding: Dispatcher[str, str, Vectors] = Dispatcher(
            self._embed,
            name=embedder.name,
            capacity=self._embedder_capacity,
            pacing=settings.pacing,
            tally=tally.embedding,
            failure=EmbeddingError,
            weigh=estimated_tokens,
        )
        self._querying: Dispatcher[AnswerKey, _Queried, _Found] = Dispatcher(
            self._query,
            name=source,
            capacity=self._store_capacity,
            pacing=settings.pacing,
            tally=tally.querying,
            failure=StoreError,
        )

    @property
    def statistics(self) -> SearchStatistics:
        """The totals of the tally, with the current state of the services."""
        return replace(self._tally.snapshot(), embedding=self._embedding.statistics, querying=self._querying.statistics)

    def close(self) -> None:
        """Fails all pending calls."""
        self._is_closed = True
        self._embedding.close()
        self._querying.close()

    async def find(self, keys: Sequence[AnswerKey]) -> Mapping[AnswerKey, Answer]:
        """Looks in memory, on disk, then asks the services; caches what they return. Raises as ``Search.search``."""
        index = self._index()
        answers = self._answers.recall(index, keys)
        self._tally.memory_hits += sum(key in answers for key in keys)
        if self._answers.is_on_disk and (missing := [key for key in keys if key not in answers]):
            kept = await self._answers.look_up(index, missing)
            self._tally.disk_hits += sum(key in kept for key in missing)
            answers |= kept
        if missing := [key for key in keys if key not in answers]:
            found = await self._ask_services(missing)
            for state in {state for state, _ in found.values() if state is not None}:
                await self._answers.keep(state, {key: answer for key, (of, answer) in found.items() if of == state})
            answers |= {key: answer for key, (_, answer) in found.items()}
        return answers

    async def _ask_services(self, keys: Sequence[AnswerKey]) -> dict[AnswerKey, _Found]:
        deadline = Deadline(self._settings.deadline)
        known = {key.query: self._vectors.get(key.query) for key in keys}
        vectors = {text: vector for text, vector in known.items() if vector is not None}
        vectors |= await self._embedding.fetch({text: text for text in known if text not in vectors}, deadline)
        return await self._querying.fetch({key: (key, vectors[key.query]) for key in keys}, deadline)

    def _index(self) -> str:
        """Names the state of the index."""
        return f"query\0{self._embedder.fingerprint}\0{self._store.fingerprint}"

    # One request to each service, called by the dispatchers. Results are cached here, because others may ask for the same
    # query before the caller wakes up.

    async def _embed(self, texts: Sequence[str]) -> Sequence[Vectors]:
        # Copies: a view would keep the whole batch in memory.
        answer = await self._embedder.embed_queries(texts)
        vectors = [row.copy() for row in checked_vectors(answer, len(texts), self._embedder)]
        for text, vector in zip(texts, vectors, strict=True):
            self._vectors.put(text, vector)
        return vectors

    async def _query(self, queried: Sequence[_Queried]) -> Sequence[_Found]:
        if self._is_closed:
            raise SearchError("the search was closed while calls were waiting")
        store, state = self._store, self._index()
        most = max(key.n_results for key, _ in queried)
        found = await store.query(np.stack([vector for _, vector in queried]), most)
        if len(found) != len(queried):
            raise PassingFault(f"{store.name} answered {len(found)} of {len(queried)} queries", cause="malformed")
        answers = {
            key: trimmed(answer[: key.n_results], key.max_words)
            for answer, (key, _) in zip(found, queried, strict=True)
        }
        # The collection may have been recreated during the request: it is unknown which one answered.
        if self._is_closed or state != self._index():
            return [(None, answer) for answer in answers.values()]
        self._answers.remember(state, answers)
        return [(state, answer) for answer in answers.values()]

    def _embedder_capacity(self) -> Capacity:
        embedder = self._embedder
        return Capacity(min(MAX_BATCH, embedder.max_texts), embedder.max_requests, embedder.max_tokens)

    def _store_capacity(self) -> Capacity:
        store = self._store
        return Capacity(min(MAX_BATCH, store.max_queries), store.max_requests)


def trimmed(passages: Sequence[Passage], max_words: int | None) -> Answer:
    """The passages, each cut to its first words."""
    if max_words is None:
        return tuple(passages)
    return tuple(replace(passage, text=first_words(passage.text, max_words)) for passage in passages)


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word, whitespace kept."""
    end = 0
    for number, match in enumerate(re.finditer(r"\S+", text), start=1):
        if number > count:
            return text[:end]
        end = match.end()
    return text

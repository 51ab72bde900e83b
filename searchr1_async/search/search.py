"""The search tool: passages for queries, gathered from hundreds of episodes into few requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio

from searchr1_async.data.corpus import Corpus, load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, SearchError
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.sentence_transformer import DEFAULT_MODEL, make_embedder
from searchr1_async.search.gathering import Gathering
from searchr1_async.search.indexing import LocalIndex, OnProgress
from searchr1_async.search.queries import MAX_QUERY_CHARACTERS, clean_query
from searchr1_async.search.statistics import SearchStatistics, Tally
from searchr1_async.search.stores.base import Found, Store
from searchr1_async.search.stores.chroma import RemoteChroma

logger = logging.getLogger(__name__)

MAX_BATCH = 128
"""Queries in one batch unless the embedder or the store takes fewer: larger ones gain nothing and keep the first waiting."""

_Key = tuple[str, int]
"""A cleaned query and the number of passages wanted."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """One call of ``search`` while it waits."""

    keys: tuple[_Key, ...]
    answers: dict[_Key, tuple[Passage, ...]] = field(default_factory=dict)
    failure: SearchError | None = None
    wake: anyio.Event = field(default_factory=anyio.Event)

    @property
    def is_done(self) -> bool:
        return self.failure is not None or all(key in self.answers for key in self.keys)


class Search:
    """The search that episodes call; made by :meth:`local` or :meth:`chroma`, or from an embedder and a store.

    ::

        async with Search.local("atlas") as search:
            (passages,) = await search.search(["capital of Namibia"])

    It runs no task of its own: of all the calls that wait, one sends the next batch for everyone, and the others are
    woken by its answer (or take over, should it be cancelled). What arrives while a batch is on its way gathers for
    the next one, and equal queries are answered once. So it may be entered by several users of one event loop at a
    time, and after it was closed in another event loop.

    Args:
        embedder: turns queries into vectors.
        store: finds the nearest passages; or a corpus with the folder of its index.
        n_results: passages for each query, 1 to 100.
        max_passage_words: passages are cut after so many words; None leaves them whole.
        deadline: seconds from asking to answer, after which a call fails.

    Raises:
        ConfigurationError: a setting out of its range.
    """

    def __init__(
        self,
        embedder: Embedder,
        store: Store | LocalIndex,
        *,
        n_results: int = 3,
        max_passage_words: int | None = None,
        deadline: float = 60.0,
    ) -> None:
        _check_n_results(n_results)
        if max_passage_words is not None and max_passage_words < 1:
            raise ConfigurationError(f"max_passage_words is {max_passage_words}: give at least 1, or None")
        if not deadline > 0:
            raise ConfigurationError(f"deadline is {deadline} s: give more than 0")
        self._embedder = embedder
        self._source = store
        self._n_results = n_results
        self._max_passage_words = max_passage_words
        self._deadline = deadline
        self._tally = Tally()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = anyio.Lock()
        self._store: Store | None = None
        self._gathering = self._new_gathering()
        self._leader: _Waiter | None = None

    @classmethod
    def local(
        cls,
        corpus: str | Path | Sequence[Passage] | Corpus = "atlas",
        *,
        path: str | Path | None = None,
        embedder: str | Path | Embedder = DEFAULT_MODEL,
        n_results: int = 3,
        max_passage_words: int | None = None,
        deadline: float = 60.0,
    ) -> Search:
        """Search over a corpus on this machine; its index is built when it is first opened, and kept.

        Args:
            corpus: ``"atlas"`` (built in), a ``.jsonl`` or ``.parquet`` file, passages, or a :class:`Corpus`.
            path: the index's folder; None means one in the user's cache, named by corpus and embedder.
            embedder: a sentence-transformers model by name or folder, or an :class:`Embedder`.
            n_results: passages for each query, 1 to 100.
            max_passage_words: passages are cut after so many words; None leaves them whole.
            deadline: seconds from asking to answer, after which a call fails.

        Raises:
            CorpusError: no such corpus, or its first row cannot be used.
            EmbeddingError: the embedder's library is not installed, or its folder does not exist.
            ConfigurationError: a setting out of its range.
        """
        index = LocalIndex(load_corpus(corpus), Path(path).expanduser() if path is not None else None)
        return cls(
            make_embedder(embedder),
            index,
            n_results=n_results,
            max_passage_words=max_passage_words,
            deadline=deadline,
        )

    @classmethod
    def chroma(
        cls,
        host: str = "localhost",
        port: int = 8000,
        collection: str = "wiki_embeddings",
        *,
        embedder: str | Path | Embedder,
        ssl: bool = False,
        headers: Mapping[str, str] | None = None,
        n_results: int = 3,
        max_passage_words: int | None = None,
        deadline: float = 60.0,
    ) -> Search:
        """Search over a collection that a Chroma server (``chroma run --path <folder>``) serves already.

        Args:
            host: name or address, or a whole URL.
            port: TCP port.
            collection: must exist; its documents are the passages, and ``title`` in the metadata is used if there.
            embedder: the one that the collection was built with: a sentence-transformers model, or an
                :class:`Embedder`.
            ssl: HTTPS.
            headers: sent with every request (a token, say).
            n_results: passages for each query, 1 to 100.
            max_passage_words: passages are cut after so many words; None leaves them whole.
            deadline: seconds from asking to answer, after which a call fails.

        Raises:
            EmbeddingError: the embedder's library is not installed, or its folder does not exist.
            StoreError: a collection name that Chroma does not take.
            ConfigurationError: a setting out of its range.
        """
        return cls(
            make_embedder(embedder),
            RemoteChroma(host, port, collection, ssl=ssl, headers=headers),
            n_results=n_results,
            max_passage_words=max_passage_words,
            deadline=deadline,
        )

    @property
    def fingerprint(self) -> str:
        """Equal for searches that give equal answers; reads a corpus file whole the first time (its hash is kept).

        Raises:
            CorpusError: the corpus cannot be used.
        """
        source = self._source
        content = source.corpus.fingerprint if isinstance(source, LocalIndex) else source.name
        parts = (content, self._embedder.fingerprint, self._n_results, self._max_passage_words)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def statistics(self) -> SearchStatistics:
        """Totals since this object was made, over all its openings."""
        return self._tally.snapshot()

    @staticmethod
    def clean_query(query: str) -> str | None:
        """See :func:`~searchr1_async.search.queries.clean_query`."""
        return clean_query(query)

    async def build(self, on_progress: OnProgress | None = None) -> None:
        """Makes the index where there is none yet; opening does so as well, so this is only for showing progress.

        Args:
            on_progress: called with passages done and in all; not at all where nothing is to be built.

        Raises:
            CorpusError: the corpus cannot be used.
            SearchError: the embedder or the store failed.
        """
        if isinstance(self._source, LocalIndex) and not self._users:
            store = await self._source.open_store(self._embedder, on_progress)
            await store.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def open(self, on_progress: OnProgress | None = None) -> None:
        """Opens the embedder and the store, building the index first if there is none. Prefer ``async with search:``.

        Every ``open`` wants its ``aclose``; the last one closes.

        Raises:
            CorpusError: the corpus cannot be used.
            SearchError: the embedder or the store cannot be opened, or the search is open in another event loop.
        """
        self._enter_loop()
        async with self._opening:
            if self._store is None:
                source = self._source
                try:
                    if isinstance(source, LocalIndex):
                        store = await source.open_store(self._embedder, on_progress)
                    else:
                        store = source
                    self._store = store
                    await self._embedder.open()
                    await store.open()
                except BaseException:
                    if not self._users:
                        await self._close()
                    raise
            self._users += 1

    async def aclose(self) -> None:
        """Closes after the last user: calls that still wait fail, connections, files and threads are let go."""
        self._users = max(0, self._users - 1)
        if not self._users:
            await self._close()

    async def search(self, queries: Sequence[str], n_results: int | None = None) -> Found:
        """The nearest passages of each query, in the order of the queries.

        Args:
            queries: cleaned by :meth:`clean_query` once more.
            n_results: passages for each query; None means the number that this search was made with.

        Raises:
            SearchError: not open, a query that cannot be cleaned, no answer within the deadline, or a failure of the
                embedder (:class:`EmbeddingError`) or the store (:class:`StoreError`).
            ConfigurationError: ``n_results`` out of its range.
        """
        keys = self._keys(queries, n_results)
        if self._store is None:
            raise SearchError("the search is not open: call it within `async with search:`")
        waiter = _Waiter(keys)
        asked = self._gathering.ask(keys, waiter)
        self._tally.requests += 1
        self._tally.texts += len(keys)
        self._tally.joined += asked.joined
        began = time.monotonic()
        try:
            with anyio.fail_after(self._deadline):
                await self._until_answered(waiter)
        except TimeoutError as error:
            self._tally.failed += 1
            raise SearchError(
                f"no answer from {self._store.name if self._store else 'the search'} and {self._embedder.name} within "
                f"{self._deadline:g} s: check that they are up, or give a longer deadline"
            ) from error
        finally:
            self._gathering.leave(keys, waiter)
            # Whoever leaves hands over, the one who was to take over and was cancelled included.
            if self._leader is None and (successor := self._gathering.next_waiter()) is not None:
                successor.wake.set()
            self._tally.seconds_waiting += time.monotonic() - began
        if waiter.failure is not None:
            self._tally.failed += 1
            raise type(waiter.failure)(str(waiter.failure)) from (waiter.failure.__cause__ or waiter.failure)
        return tuple(waiter.answers[key] for key in keys)

    async def _until_answered(self, waiter: _Waiter) -> None:
        """Waits for others to send, or sends for all while nobody else does."""
        while not waiter.is_done:
            if self._leader is not None:
                waiter.wake = anyio.Event()
                await waiter.wake.wait()
                continue
            self._leader = waiter
            try:
                while not waiter.is_done:
                    await self._send_batch()
            finally:
                self._leader = None

    async def _send_batch(self) -> None:
        batch = self._gathering.take()
        found: Found | SearchError
        try:
            found = await self._find(batch)
        except SearchError as error:
            found = error
        except Exception as error:
            found = SearchError(f"the search failed on {len(batch)} queries ({type(error).__name__}: {error})")
            found.__cause__ = error
        except BaseException:  # the sender is cancelled, the others are not: another of them sends this again
            self._gathering.give_back(batch)
            raise
        for number, (key, waiters) in enumerate(self._gathering.finish(batch).items()):
            for waiter in waiters:
                if isinstance(found, SearchError):
                    waiter.failure = found
                else:
                    waiter.answers[key] = found[number]
                if waiter.is_done:
                    waiter.wake.set()

    async def _find(self, batch: Sequence[_Key]) -> Found:
        """One request to the embedder and one to the store, more only where they take fewer at once."""
        store, embedder = self._store, self._embedder
        if store is None:
            raise SearchError("the search was closed while calls were waiting")
        texts = tuple(dict.fromkeys(text for text, _ in batch))
        most = max(n_results for _, n_results in batch)
        began = time.monotonic()
        vectors = await embedder.embed_queries(texts)
        embedded = time.monotonic()
        found = await store.query(vectors, most)
        self._tally.seconds_embedding += embedded - began
        self._tally.seconds_querying += time.monotonic() - embedded
        self._tally.sizes[len(texts)] += 1
        if len(found) != len(texts):
            raise SearchError(f"{store.name} answered {len(found)} of {len(texts)} queries")
        by_text = dict(zip(texts, found, strict=True))
        return tuple(self._trim(by_text[text][:n_results]) for text, n_results in batch)

    def _trim(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        most = self._max_passage_words
        if most is None:
            return tuple(passages)
        return tuple(replace(passage, text=first_words(passage.text, most)) for passage in passages)

    def _keys(self, queries: Sequence[str], n_results: int | None) -> tuple[_Key, ...]:
        wanted = self._n_results if n_results is None else n_results
        _check_n_results(wanted)
        keys: list[_Key] = []
        for query in queries:
            cleaned = clean_query(query)
            if cleaned is None:
                raise SearchError(
                    f"a query of {len(query)} characters cannot be searched for: it has no letter or digit, or more "
                    f"than {MAX_QUERY_CHARACTERS} characters (ask clean_query first)"
                )
            keys.append((cleaned, wanted))
        return tuple(keys)

    def _enter_loop(self) -> None:
        """One event loop at a time; what a loop that is gone left behind is forgotten."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._users and self._loop is not None and not self._loop.is_closed():
            raise SearchError("the search is open in another event loop: close it there, or make another one")
        if self._users:
            logger.warning("the search was left open by an event loop that is gone: it is opened anew")
        self._loop, self._users, self._store, self._leader = loop, 0, None, None
        self._opening = anyio.Lock()
        self._gathering = self._new_gathering()

    async def _close(self) -> None:
        store, self._store = self._store, None
        for waiter in self._gathering.clear():
            waiter.failure = SearchError("the search was closed while calls were waiting")
            waiter.wake.set()
        with anyio.CancelScope(shield=True):
            try:
                if store is not None:
                    await store.aclose()
            finally:
                await self._embedder.aclose()

    def _new_gathering(self) -> Gathering[_Key, _Waiter]:
        limits = [MAX_BATCH, self._embedder.max_texts]
        if not isinstance(self._source, LocalIndex):
            limits.append(self._source.max_queries)
        return Gathering(min(limits))


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word, spaces as they are."""
    end = 0
    for number, match in enumerate(re.finditer(r"\S+", text), start=1):
        if number > count:
            return text[:end]
        end = match.end()
    return text


def _check_n_results(n_results: int) -> None:
    if not 1 <= n_results <= 100:
        raise ConfigurationError(f"n_results is {n_results}: give 1 to 100")

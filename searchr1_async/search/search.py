"""The search tool: coalesces the queries of thousands of concurrent rollouts into few requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import anyio
import anyio.to_thread
import numpy as np

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.data.corpus import CorpusSource, load_corpus
from searchr1_async.episodes.prompts import MAX_QUERY_CHARACTERS, clean_query
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, EmbeddingError, SearchError, StoreError
from searchr1_async.search.cache import Answer, AnswerCache, AnswerKey, LeastRecentlyUsed
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.embedders import DEFAULT_MODEL, Embedder, Vectors, checked_vectors
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.gathering import Deadline
from searchr1_async.search.gemini import make_embedder
from searchr1_async.search.index import LocalIndex, OnProgress, log_notices
from searchr1_async.search.passage_embedding import BuildOptions
from searchr1_async.search.places import (
    SearchOptions,
    SearchSettings,
    check_n_results,
    compact_place,
    is_address,
    look_up,
)
from searchr1_async.search.retries import Capacity
from searchr1_async.search.stats import SearchStatistics, SearchTally, ServiceTally
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.sources import lasting_name
from searchr1_async.search.stores.vector_store import Found, Store, open_embedder, open_store

logger = logging.getLogger(__name__)

MAX_BATCH = 128
"""Queries per request, unless the embedder or the store takes fewer. Larger batches gain nothing and delay the first query."""
VECTORS_KEPT = 4_096
"""Query vectors in memory (12 MB at 768 dimensions), for queries repeated while their lookup is pending."""

_Found = tuple[str | None, Answer]
"""An answer and the index state it is valid for; None if the index changed during the request."""
_Queried = tuple[AnswerKey, Vectors]
"""Answer key and query vector ``[dimension]``."""


class Search:
    """The search that rollouts call. Create it with :meth:`local`, :meth:`chroma` or :meth:`open`, or from an embedder and a store.

    ::

        async with Search.local("atlas") as search:
            (passages,) = await search.search(["capital of Namibia"])

    Queries that arrive while requests are in flight are batched into the next request; equal queries are sent once, and
    repeated ones come from a cache. Embedding and lookup are pipelined and paced separately. There is no background task
    (see :mod:`~searchr1_async.search.dispatch`). Several users of one event loop may enter it, and it can be reopened in
    another event loop once closed.

    Args:
        embedder: turns queries into vectors.
        store: finds the nearest passages; or a corpus with its index folder.
        options: see :class:`SearchOptions`.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    def __init__(self, embedder: Embedder, store: Store | LocalIndex, **options: Unpack[SearchOptions]) -> None:
        settings = SearchSettings(**options)
        self._settings = settings
        self.named = frozenset(options)
        """Names of the options that were given; the others have their defaults."""
        path = settings.cache_path
        self._answers = AnswerCache(
            settings.cache_entries, None if path is None else absolute_path(path, "cache_path"), settings.cache_bytes
        )
        self._embedder = embedder
        self._source = store
        self._tally = SearchTally()
        self._embedding_tally, self._querying_tally = ServiceTally(), ServiceTally()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._description: dict[str, Any] | None = None
        self._reset_loop_state()

    def _reset_loop_state(self) -> None:
        """Creates the state that is bound to one event loop."""
        self._opening = anyio.Lock()
        self._store: Store | None = None
        self._reset_services()

    def _reset_services(self) -> None:
        """Resets the per-opening state: a reopened search does not inherit an old outage or rate limit."""
        self._vectors: LeastRecentlyUsed[str, Vectors] = LeastRecentlyUsed(VECTORS_KEPT)
        self._embedding: Dispatcher[str, str, Vectors] = Dispatcher(
            self._embed,
            name=self._embedder.name,
            capacity=self._embedder_capacity,
            pacing=self._settings.pacing,
            tally=self._embedding_tally,
            failure=EmbeddingError,
            weigh=estimated_tokens,
        )
        self._querying: Dispatcher[AnswerKey, _Queried, _Found] = Dispatcher(
            self._query,
            name=self._source.corpus.source if isinstance(self._source, LocalIndex) else self._source.name,
            capacity=self._store_capacity,
            pacing=self._settings.pacing,
            tally=self._querying_tally,
            failure=StoreError,
        )

    @classmethod
    def local(
        cls,
        corpus: CorpusSource = "atlas",
        *,
        path: str | Path | None = None,
        embedder: str | Path | Embedder = DEFAULT_MODEL,
        **options: Unpack[SearchOptions],
    ) -> Search:
        """Search over a corpus on this machine. The index is built when it is first opened, and kept.

        Args:
            corpus: ``"atlas"`` (built in), a file, passages, a frame or a list of dicts; see :func:`load_corpus`.
            path: the index folder; None for one in the user's cache, named by corpus and embedder.
            embedder: a sentence-transformers model by name or folder, ``"gemini-embedding-001"``, or an :class:`Embedder`.
            options: see :class:`SearchOptions`.

        Raises:
            CorpusError: no such corpus, or its first row is unusable.
            EmbeddingError: the embedder's library is not installed, or its folder does not exist.
            ConfigurationError: a setting is out of range.
        """
        place = None if path is None else absolute_path(path, "path")
        index = LocalIndex(load_corpus(corpus), place)
        search = cls(make_embedder(embedder), index, **options)
        if isinstance(corpus, str | Path) and isinstance(embedder, str | Path):
            file = absolute_path(corpus, "corpus")
            search._description = {
                "kind": "local",
                "corpus": str(file) if file.is_file() else str(corpus),
                "path": None if place is None else str(place),
                "embedder": lasting_name(embedder),
            }
        return search

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
        token: str | None = None,
        tenant: str = "default_tenant",
        database: str = "default_database",
        **options: Unpack[SearchOptions],
    ) -> Search:
        """Search over an existing collection of a Chroma server (``chroma run --path <folder>``).

        For Chroma Cloud, use ``Search(embedder, RemoteChroma.cloud(...))``.

        Args:
            host: name, address or URL.
            port: TCP port.
            collection: must exist. Its documents are the passages; ``title`` in the metadata is used if present.
            embedder: the one the collection was built with: ``"gemini-embedding-001"`` for the recipe's, a
                sentence-transformers model, or an :class:`Embedder`.
            ssl: use HTTPS.
            headers: sent with every request.
            token: sent as Chroma's token header.
            tenant: of the collection.
            database: of the collection.
            options: see :class:`SearchOptions`.

        Raises:
            EmbeddingError: the embedder's library is not installed, or its folder does not exist.
            StoreError: invalid collection name.
            ConfigurationError: a setting is out of range.
        """
        store = RemoteChroma(
            host, port, collection, ssl=ssl, headers=headers, token=token, tenant=tenant, database=database
        )
        search = cls(make_embedder(embedder), store, **options)
        # Secrets must not end up in a description.
        if isinstance(embedder, str | Path) and headers is None and token is None:
            search._description = {
                "kind": "chroma",
                "host": host,
                "port": port,
                "collection": collection,
                "embedder": lasting_name(embedder),
                "ssl": ssl,
                "tenant": tenant,
                "database": database,
            }
        return search

    @classmethod
    async def open(
        cls,
        place: str | Path,
        *,
        embedder: str | Path | Embedder | None = None,
        collection: str | None = None,
        token: str | None = None,
        **options: Unpack[SearchOptions],
    ) -> Search:
        """Search over an index, corpus or server, detected from ``place``. Does not connect yet.

        ::

            search = await Search.open("wiki18.index")               # a compact index
            search = await Search.open("http://192.168.0.7:8200")    # `python -m searchr1_async serve`

        Args:
            place: folder of a compact index, of an index built by :meth:`local`, or of a Chroma database; a corpus (as for
                :meth:`local`); or the URL of ``searchr1_async serve`` or, with ``collection``, of a Chroma server.
            embedder: of the index's vectors; None for the one the index names, or the remote one of a served search.
            collection: of a Chroma folder or server; None for the only one of a folder.
            token: of a server.
            options: see :class:`SearchOptions`.

        Raises:
            ConfigurationError: the embedder is unknown or does not match the index, or there are several collections.
            CorpusError: no such corpus.
            EmbeddingError: the embedder's library or folder is missing.
            StoreError: nothing searchable, an unfinished index, or no answer from the server.
        """
        if not is_address(place):
            # The name of a built-in corpus is not a path.
            there = absolute_path(place, "place")
            place = there if there.exists() else place
        found = await look_up(place, embedder, collection, token)
        if found is None:
            return await anyio.to_thread.run_sync(
                lambda: cls.local(place, embedder=DEFAULT_MODEL if embedder is None else embedder, **options)
            )
        search = cls(found.embedder, found.store, **options)
        if isinstance(found.store, CompactStore):
            search._describe_compact(found.store.folder, embedder)
        return search

    @classmethod
    def compact(
        cls, folder: str | Path, *, embedder: str | Path | Embedder | None = None, **options: Unpack[SearchOptions]
    ) -> Search:
        """Search over a compact index. :meth:`open` detects one by itself.

        Raises:
            ConfigurationError, EmbeddingError, StoreError: as :meth:`open`.
        """
        path = absolute_path(folder, "folder")
        found = compact_place(path, embedder)
        search = cls(found.embedder, found.store, **options)
        search._describe_compact(path, embedder)
        return search

    def _describe_compact(self, folder: Path, embedder: str | Path | Embedder | None) -> None:
        if embedder is None or isinstance(embedder, str | Path):
            self._description = {
                "kind": "compact",
                "folder": str(folder),
                "embedder": lasting_name(embedder),
            }

    @property
    def n_results(self) -> int:
        """Default number of passages per query."""
        return self._settings.n_results

    @property
    def description(self) -> dict[str, Any] | None:
        """JSON values for :meth:`from_description`; None if they would need in-memory objects or secrets."""
        if self._description is None:
            return None
        settings = self._settings
        return {
            **self._description,
            "n_results": settings.n_results,
            "max_passage_words": settings.max_passage_words,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Search:
        """Recreates a described search, without opening it.

        Raises:
            ConfigurationError: not a description of a search.
            CorpusError, EmbeddingError, StoreError: as :meth:`local` and :meth:`chroma`.
        """
        arguments = dict(description)
        kind = arguments.pop("kind", None)
        makers = {"local": cls.local, "chroma": cls.chroma, "compact": cls.compact}
        if kind not in makers:
            raise ConfigurationError(
                f"a search of kind {kind!r} cannot be made from its description: pass the search itself"
            )
        try:
            return makers[kind](**arguments)
        except TypeError as error:
            raise ConfigurationError(f"invalid search description: {error}") from error

    @property
    def embedder(self) -> Embedder:
        return self._embedder

    @property
    def source(self) -> Store | LocalIndex:
        """A store, or a corpus with its index folder."""
        return self._source

    @property
    def store(self) -> Store | None:
        """The open store; None while the search is closed."""
        return self._store

    @property
    def settings(self) -> SearchSettings:
        return self._settings

    @property
    def is_open(self) -> bool:
        return self._users > 0

    @property
    def fingerprint(self) -> str:
        """Equal for searches with equal answers. Reads the whole corpus file the first time (its hash is cached).

        Raises:
            CorpusError: the corpus is unusable.
        """
        return self.fingerprint_of()

    def fingerprint_of(self, n_results: int | None = None, max_passage_words: int | None = None) -> str:
        """The :attr:`fingerprint` under other settings, as passed to :meth:`search`."""
        source = self._source
        match source:
            case LocalIndex():
                content = source.corpus.fingerprint
            case CompactStore():
                content = source.fingerprint
            case _:
                content = source.name
        shown = (n_results or self._settings.n_results, self._words(max_passage_words))
        return hashlib.sha256(repr((content, self._embedder.fingerprint, *shown)).encode()).hexdigest()[:32]

    @property
    def statistics(self) -> SearchStatistics:
        """Totals since this object was created, over all openings, and the current state of its services."""
        tally = self._tally
        return SearchStatistics(
            requests=tally.requests,
            texts=tally.texts,
            memory_hits=tally.memory_hits,
            disk_hits=tally.disk_hits,
            failed=tally.failed,
            latency=tally.latency.snapshot(),
            embedding=self._embedding.statistics,
            querying=self._querying.statistics,
        )

    async def build(self, on_progress: OnProgress | None = None) -> None:
        """Builds the index if there is none, and rebuilds a damaged one.

        Opening also builds a missing index; use this to show progress, or to repair an index that cannot be opened.

        Args:
            on_progress: called with passages done and total; not called if there is nothing to build.

        Raises:
            CorpusError: the corpus is unusable.
            SearchError: the embedder or the store failed.
        """
        if isinstance(self._source, LocalIndex) and not self._users:
            await self._source.build(self._embedder, BuildOptions(on_progress=on_progress, emit=log_notices))

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def connect(self, on_progress: OnProgress | None = None) -> None:
        """Opens the embedder and the store, building a missing index first. Prefer ``async with search:``.

        Pair every ``connect`` with an ``aclose``; the last ``aclose`` closes the search.

        Raises:
            CorpusError: the corpus is unusable.
            SearchError: the embedder or the store cannot be opened, their dimensions differ, or the search is open in
                another event loop.
        """
        self._enter_loop()
        async with self._opening:
            if self._store is None:
                self._reset_services()
                try:
                    self._store = await self._open_services(on_progress)
                except BaseException:
                    await self._close()
                    raise
            self._users += 1

    async def _open_services(self, on_progress: OnProgress | None) -> Store:
        source = self._source
        if isinstance(source, LocalIndex):
            store = await source.open_store(self._embedder, on_progress)
        else:
            store = source
            await open_store(store, self._settings.pacing)
        try:
            await open_embedder(self._embedder, self._settings.pacing)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await store.aclose()
            raise
        held = store.dimension
        if held not in (None, self._embedder.dimension):
            with anyio.CancelScope(shield=True):
                await store.aclose()
            raise StoreError(
                f"{store.name} holds vectors of dimension {held}, but {self._embedder.name} produces dimension "
                f"{self._embedder.dimension}: it was built with another embedder, use that one",
                is_fatal=True,
            )
        return store

    async def aclose(self) -> None:
        """Closes after the last user: fails pending calls, releases connections, files and threads."""
        # Under the lock: another user may be opening what this one closes.
        with anyio.CancelScope(shield=True):
            async with self._opening:
                self._users = max(0, self._users - 1)
                if not self._users:
                    await self._close()

    async def search(
        self, queries: Sequence[str], n_results: int | None = None, *, max_passage_words: int | None = None
    ) -> Found:
        """The nearest passages of each query, in the order of the queries.

        Args:
            queries: passed through :func:`~searchr1_async.episodes.prompts.clean_query`.
            n_results: passages per query; None for the search's default.
            max_passage_words: truncates passages to so many words, 0 for whole passages; None for the search's default.

        Raises:
            SearchError: the search is not open, a query cannot be cleaned, the deadline passed, or the embedder
                (:class:`EmbeddingError`) or the store (:class:`StoreError`) failed. ``is_fatal`` if later searches fail too.
            SearchUnavailableError: a service was down longer than ``PacingSettings.max_outage``, or its ``Retry-After``
                exceeds ``PacingSettings.longest_wait``; always fatal.
            ConfigurationError: ``n_results`` is out of range.
        """
        return await self.find(_cleaned(queries), n_results, max_passage_words=max_passage_words)

    async def find(
        self, queries: Sequence[str], n_results: int | None = None, *, max_passage_words: int | None = None
    ) -> Found:
        """:meth:`search` for queries that :func:`~searchr1_async.episodes.prompts.clean_query` returned."""
        keys = self._keys(queries, n_results)
        if self._store is None:
            raise SearchError("the search is not open: use it within `async with search:`")
        self._tally.requests += 1
        self._tally.texts += len(keys)
        began = time.monotonic()
        try:
            answers = await self._answer(keys, self._store)
        except SearchError:
            self._tally.failed += 1
            raise
        self._tally.latency.add(time.monotonic() - began)
        return tuple(self._trim(answers[key], max_passage_words) for key in keys)

    async def _answer(self, keys: Sequence[AnswerKey], store: Store) -> Mapping[AnswerKey, Answer]:
        """Looks in memory, on disk, then asks the services; caches what they return."""
        index = self._answers_of(store)
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
        known = {text: self._vectors.get(text) for text, _ in keys}
        vectors = {text: vector for text, vector in known.items() if vector is not None}
        vectors |= await self._embedding.fetch({text: text for text in known if text not in vectors}, deadline)
        return await self._querying.fetch({key: (key, vectors[key[0]]) for key in keys}, deadline)

    def _answers_of(self, store: Store) -> str:
        """The cache key of the index state."""
        return f"query\0{self._embedder.fingerprint}\0{store.fingerprint}"

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
        if self._store is None:
            raise SearchError("the search was closed while calls were waiting")
        store, state = self._store, self._answers_of(self._store)
        most = max(n_results for (_, n_results), _ in queried)
        found = await store.query(np.stack([vector for _, vector in queried]), most)
        if len(found) != len(queried):
            raise PassingFault(f"{store.name} answered {len(found)} of {len(queried)} queries", cause="malformed")
        answers = {key: answer[: key[1]] for answer, (key, _) in zip(found, queried, strict=True)}
        # The collection may have been recreated during the request: it is unknown which one answered.
        if store is not self._store or state != self._answers_of(store):
            return [(None, answer) for answer in answers.values()]
        self._answers.remember(state, answers)
        return [(state, answer) for answer in answers.values()]

    def _embedder_capacity(self) -> Capacity:
        embedder = self._embedder
        return Capacity(min(MAX_BATCH, embedder.max_texts), embedder.max_requests, embedder.max_tokens)

    def _store_capacity(self) -> Capacity:
        store = self._store
        return Capacity(1, 1) if store is None else Capacity(min(MAX_BATCH, store.max_queries), store.max_requests)

    def _trim(self, passages: Sequence[Passage], most: int | None) -> tuple[Passage, ...]:
        most = self._words(most)
        if most is None:
            return tuple(passages)
        return tuple(replace(passage, text=first_words(passage.text, most)) for passage in passages)

    def _words(self, max_passage_words: int | None) -> int | None:
        return self._settings.max_passage_words if max_passage_words is None else max_passage_words or None

    def _keys(self, queries: Sequence[str], n_results: int | None) -> tuple[AnswerKey, ...]:
        wanted = self._settings.n_results if n_results is None else n_results
        check_n_results(wanted)
        return tuple((query, wanted) for query in queries)

    def _enter_loop(self) -> None:
        """Binds to the running event loop; drops state left by a closed one."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._users and self._loop is not None and not self._loop.is_closed():
            raise SearchError("the search is open in another event loop: close it there, or create another one")
        if self._users:
            logger.warning("the search was left open by a closed event loop; reopening it")
        self._loop, self._users = loop, 0
        self._reset_loop_state()

    async def _close(self) -> None:
        store, self._store = self._store, None
        self._embedding.close()
        self._querying.close()
        with anyio.CancelScope(shield=True):
            try:
                if store is not None:
                    await store.aclose()
            finally:
                try:
                    await self._embedder.aclose()
                finally:
                    await self._answers.aclose()


def _cleaned(queries: Sequence[str]) -> list[str]:
    cleaned = [clean_query(query) for query in queries]
    if None in cleaned:
        raise SearchError(
            f"invalid query of {len(queries[cleaned.index(None)])} characters: it has no letter or digit, or more than "
            f"{MAX_QUERY_CHARACTERS} characters (check with clean_query first)"
        )
    return [query for query in cleaned if query is not None]


def estimated_tokens(text: str) -> int:
    """Upper estimate of a text's tokens: one per three bytes of UTF-8 (English has about four)."""
    return len(text.encode("utf-8", "surrogatepass")) // 3 + 1


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word, whitespace kept."""
    end = 0
    for number, match in enumerate(re.finditer(r"\S+", text), start=1):
        if number > count:
            return text[:end]
        end = match.end()
    return text

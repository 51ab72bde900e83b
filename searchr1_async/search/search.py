"""The search that rollouts call: opened in one event loop, shared by thousands of concurrent episodes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import anyio

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.data.corpus import CorpusSource
from searchr1_async.episodes.prompts import MAX_QUERY_CHARACTERS, clean_query
from searchr1_async.errors import ConfigurationError, SearchError, StoreError
from searchr1_async.search.answers import AnswerCache, AnswerKey, Lookup
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.embedders import DEFAULT_MODEL, Embedder
from searchr1_async.search.index import LocalIndex, OnProgress, log_notices
from searchr1_async.search.passage_embedding import BuildOptions
from searchr1_async.search.places import (
    Place,
    SearchOptions,
    SearchSettings,
    check_n_results,
    chroma_place,
    compact_place,
    find_place,
    local_place,
)
from searchr1_async.search.stats import SearchStatistics, SearchTally
from searchr1_async.search.stores.vector_store import Found, Store, open_embedder, open_store

logger = logging.getLogger(__name__)


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
        self._description: Mapping[str, Any] | None = None
        self._tally = SearchTally()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = anyio.Lock()
        self._store: Store | None = None
        self._lookup: Lookup | None = None

    @classmethod
    def _at(cls, place: Place, **options: Unpack[SearchOptions]) -> Self:
        search = cls(place.embedder, place.store, **options)
        search._description = place.description
        return search

    @classmethod
    def local(
        cls,
        corpus: CorpusSource = "atlas",
        *,
        path: str | Path | None = None,
        embedder: str | Path | Embedder = DEFAULT_MODEL,
        **options: Unpack[SearchOptions],
    ) -> Self:
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
        return cls._at(local_place(corpus, path, embedder), **options)

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
    ) -> Self:
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
        address = {"host": host, "port": port, "collection": collection, "ssl": ssl}
        address |= {"tenant": tenant, "database": database}
        return cls._at(chroma_place(address, embedder, headers, token), **options)

    @classmethod
    async def open(
        cls,
        place: str | Path,
        *,
        embedder: str | Path | Embedder | None = None,
        collection: str | None = None,
        token: str | None = None,
        **options: Unpack[SearchOptions],
    ) -> Self:
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
        return cls._at(await find_place(place, embedder, collection, token), **options)

    @classmethod
    def compact(
        cls, folder: str | Path, *, embedder: str | Path | Embedder | None = None, **options: Unpack[SearchOptions]
    ) -> Self:
        """Search over a compact index. :meth:`open` detects one by itself.

        Raises:
            ConfigurationError, EmbeddingError, StoreError: as :meth:`open`.
        """
        return cls._at(compact_place(absolute_path(folder, "folder"), embedder), **options)

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
        return self._tally.snapshot() if self._lookup is None else self._lookup.statistics

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
                try:
                    self._store = await self._open_services(on_progress)
                except BaseException:
                    await self._close()
                    raise
                source = self._source
                name = source.corpus.source if isinstance(source, LocalIndex) else source.name
                self._lookup = Lookup(self._embedder, self._store, name, self._settings, self._answers, self._tally)
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
        dimension = store.dimension
        if dimension not in (None, self._embedder.dimension):
            with anyio.CancelScope(shield=True):
                await store.aclose()
            raise StoreError(
                f"{store.name} holds vectors of dimension {dimension}, but {self._embedder.name} produces dimension "
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
        wanted = self._settings.n_results if n_results is None else n_results
        check_n_results(wanted)
        words = self._words(max_passage_words)
        keys = [AnswerKey(query, wanted, words) for query in queries]
        if self._store is None or self._lookup is None:
            raise SearchError("the search is not open: use it within `async with search:`")
        self._tally.requests += 1
        self._tally.texts += len(keys)
        began = time.monotonic()
        try:
            answers = await self._lookup.find(keys)
        except SearchError:
            self._tally.failed += 1
            raise
        self._tally.latency.add(time.monotonic() - began)
        return tuple(answers[key] for key in keys)

    @property
    def for_cleaned(self) -> Callable[..., Awaitable[Found]]:
        """What episodes and the server call: :meth:`find`, or :meth:`search` where a subclass or an object has its own."""
        return self.find if getattr(self.search, "__func__", None) is Search.search else self.search

    def _words(self, max_passage_words: int | None) -> int | None:
        return self._settings.max_passage_words if max_passage_words is None else max_passage_words or None

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
        self._opening, self._store, self._lookup = anyio.Lock(), None, None

    async def _close(self) -> None:
        store, self._store = self._store, None
        if self._lookup is not None:
            self._lookup.close()
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

"""The search that rollouts call: opened in one event loop, shared by thousands of concurrent episodes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import anyio

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.settings import check_setting
from searchr1_async.boundary.waits import REPORT_AFTER, Notify
from searchr1_async.data.corpus import CorpusSource
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.prompts import MAX_QUERY_CHARACTERS, clean_query
from searchr1_async.errors import ConfigurationError, SearchError
from searchr1_async.search.answers import Lookup, SearchOptions, SearchSettings
from searchr1_async.search.cache import AnswerCache, AnswerKey
from searchr1_async.search.embedders import DEFAULT_MODEL, Embedder
from searchr1_async.search.index import LocalIndex, OnProgress, log_notices
from searchr1_async.search.passage_embedding import BuildOptions
from searchr1_async.search.retrievers import (
    OpenStore,
    Retriever,
    chroma_retriever,
    described_retriever,
    find_retriever,
    local_retriever,
)
from searchr1_async.search.stats import SearchStatistics
from searchr1_async.search.stores.vector_store import Found

logger = logging.getLogger(__name__)


class Search:
    """The search that rollouts call. Create it with :meth:`local`, :meth:`chroma` or :meth:`open`, or from an embedder and a store.

    ::

        async with Search.local("atlas") as search:
            (passages,) = await search.search(["capital of Namibia"])

    Queries that arrive while requests are in flight are batched into the next request; equal queries are sent once, and
    repeated ones come from a cache. Several users of one event loop may enter it, and it can be reopened in another event loop.

    Args:
        embedder: turns queries into vectors; None for a served search, which does so itself.
        store: finds the nearest passages; or a corpus with its index folder.
        options: see :class:`SearchSettings`.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    def __init__(
        self, embedder: Embedder | None, store: OpenStore | LocalIndex, **options: Unpack[SearchOptions]
    ) -> None:
        self.settings = settings = SearchSettings(**options)
        self.named = frozenset(options)
        """Names of the options that were given; the others have their defaults."""
        path = settings.cache_path
        self._answers = AnswerCache(
            settings.cache_entries, None if path is None else absolute_path(path, "cache_path"), settings.cache_bytes
        )
        self._retriever = Retriever(embedder, store)
        self._tally = SearchStatistics()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = anyio.Lock()
        self._beside: set[_Opening] = set()
        self.store: OpenStore | None = None
        """The open store; None while the search is closed."""
        self._lookup: Lookup | None = None

    @classmethod
    def _over(cls, retriever: Retriever, **options: Unpack[SearchOptions]) -> Self:
        search = cls(retriever.embedder, retriever.store, **options)
        search._retriever = retriever
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
            options: see :class:`SearchSettings`.

        Raises:
            CorpusError: no such corpus, or its first row is unusable.
            EmbeddingError: the embedder's library is not installed, or its folder does not exist.
            ConfigurationError: a setting is out of range.
        """
        return cls._over(local_retriever(corpus, path, embedder), **options)

    @classmethod
    def chroma(
        cls,
        host: str = "localhost",
        port: int = 8000,
        collection: str = "wiki_embeddings",
        *,
        embedder: str | Path | Embedder,
        **options: Unpack[SearchOptions],
    ) -> Self:
        """Search over an existing collection of a Chroma server (``chroma run --path <folder>``).

        With a token, another tenant or Chroma Cloud: ``Search(embedder, RemoteChroma(...))``.

        Args:
            host: name, address or URL.
            port: TCP port.
            collection: must exist. Its documents are the passages; ``title`` in the metadata is used if present.
            embedder: of the collection's vectors, as for :meth:`local`; ``"gemini-embedding-001"`` for the recipe's.
            options: see :class:`SearchSettings`.

        Raises:
            EmbeddingError: the embedder's library is not installed, or its folder does not exist.
            StoreError: invalid collection name.
            ConfigurationError: a setting is out of range.
        """
        return cls._over(chroma_retriever(embedder, host=host, port=port, collection=collection), **options)

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
            place: folder of an index or a Chroma database; a corpus, as for :meth:`local`; or the URL of ``searchr1_async serve`` or,
                with ``collection``, of a Chroma server.
            embedder: of the index's vectors; None for the one the index names, or for a served search.
            collection: of a Chroma folder or server; None for the only one of a folder.
            token: of a server.
            options: see :class:`SearchSettings`.

        Raises:
            ConfigurationError: the embedder is unknown or does not match the index, or there are several collections.
            CorpusError: no such corpus.
            EmbeddingError: the embedder's library or folder is missing.
            StoreError: nothing searchable, an unfinished index, or no answer from the server.
        """
        return cls._over(await find_retriever(place, embedder, collection, token), **options)

    @property
    def n_results(self) -> int:
        return self.settings.n_results

    @property
    def description(self) -> dict[str, Any] | None:
        """JSON values for :meth:`from_description`; None if they would need in-memory objects or secrets."""
        described = self._retriever.description
        return None if described is None else {**described, **self._shown}

    @property
    def _shown(self) -> dict[str, Any]:
        return {"n_results": self.settings.n_results, "max_passage_words": self.settings.max_passage_words}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Recreates a described search, without opening it. Raises ConfigurationError if it is none, or as :meth:`local`."""
        arguments = dict(description)
        shown = {name: arguments.pop(name) for name in ("n_results", "max_passage_words") if name in arguments}
        return cls._over(described_retriever(**arguments), **SearchOptions(**shown))

    def record(self) -> dict[str, Any]:
        """JSON values for :meth:`from_record`. Reads the whole corpus: call it in a worker thread. Raises CorpusError."""
        return {
            "fingerprint": self.fingerprint,
            "embedder": self.embedder_name,
            "source": self._retriever.name,
            "passages": len(self.source.corpus) if isinstance(self.source, LocalIndex) else None,
            **self._shown,
            "description": self.description,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], search: Search | None, owner: str) -> Search:
        """The search of a record. Reads the whole corpus: call it in a worker thread.

        Args:
            record: from :meth:`record`.
            search: the given one; None recreates it from the record's description.
            owner: of the record, for messages: ``the manifest``.

        Raises:
            ConfigurationError: no description and no search given, or the search gives other answers.
            CorpusError, EmbeddingError, StoreError: as :meth:`from_description`.
        """
        if search is None:
            if record["description"] is None:
                raise ConfigurationError(
                    f"{owner} cannot describe its search ({record['source']}, {record['embedder']}): pass the search"
                )
            search = cls.from_description(record["description"])
        if search.fingerprint != record["fingerprint"]:
            raise ConfigurationError(
                f"the search gives other answers than that of {owner} ({record['source']}, {record['embedder']}, "
                f"{record['n_results']} results): use the same corpus, embedder and number of results"
            )
        return search

    @property
    def embedder(self) -> Embedder | None:
        """None for a served search, which embeds queries itself."""
        return self._retriever.embedder

    @property
    def embedder_name(self) -> str:
        return self._retriever.embedder_name

    @property
    def embedder_fingerprint(self) -> str:
        return self._retriever.embedder_fingerprint

    @property
    def source(self) -> OpenStore | LocalIndex:
        return self._retriever.store

    @property
    def is_open(self) -> bool:
        return self._users > 0

    @property
    def fingerprint(self) -> str:
        """Equal for searches with equal answers. Reads the whole corpus file the first time. Raises CorpusError."""
        return self.fingerprint_of()

    def fingerprint_of(self, n_results: int | None = None, max_passage_words: int | None = None) -> str:
        """The :attr:`fingerprint` under other settings, as passed to :meth:`search`."""
        shown = (n_results or self.settings.n_results, self._words(max_passage_words))
        identity = (self._retriever.content, self.embedder_fingerprint, *shown)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    @property
    def statistics(self) -> SearchStatistics:
        """Totals since this object was created, over all openings, and the current state of its services."""
        return self._tally.snapshot() if self._lookup is None else self._lookup.statistics

    async def build(self, on_progress: OnProgress | None = None) -> None:
        """Builds a missing index, as opening does, or rebuilds one that is damaged. Raises CorpusError and SearchError.

        Args:
            on_progress: called with passages done and total; not called if there is nothing to build.
        """
        if isinstance(self.source, LocalIndex) and self.embedder is not None and not self._users:
            await self.source.build(self.embedder, BuildOptions(on_progress=on_progress, emit=log_notices))

    async def __aenter__(self) -> Self:
        await self.opened()  # a connect that is cancelled closes the embedder, perhaps under a build
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
            if self.store is None:
                try:
                    self.store = await self._retriever.open(self.settings.pacing, on_progress)
                except BaseException:
                    await self._close()
                    raise
                self._lookup = Lookup(self._retriever, self.store, self.settings, self._answers, self._tally)
            self._users += 1

    @asynccontextmanager
    async def opening(self, on_progress: OnProgress | None = None, tell: Notify = logger.info) -> AsyncIterator[None]:
        """As :meth:`build` and ``async with search:``, but both beside the block, in which searches wait until it is open.

        Args:
            on_progress: as of :meth:`build`.
            tell: receives one sentence if somebody waits for over :data:`~searchr1_async.boundary.waits.REPORT_AFTER` seconds.

        Raises:
            ExceptionGroup: with what :meth:`build` and :meth:`connect` raise; it cancels the block.
        """
        self._enter_loop()
        async with AsyncExitStack() as stack:
            own = stack.enter_context(_Opening(tell, self._beside))

            async def open_it() -> None:
                await self.build(on_progress)
                await self.connect()
                stack.push_async_callback(self.aclose)
                own.end()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(open_it)
                yield
                tasks.cancel_scope.cancel()

    async def opened(self) -> None:
        """Waits until the search is open, if it is :meth:`opening`; returns at once if it is not."""
        while self.store is None and self._beside:
            await next(iter(self._beside)).wait()

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
        """The nearest passages of each query, in the order of the queries. What episodes call.

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
        wanted, words = self.settings.n_results, self._words(max_passage_words)
        if n_results is not None:
            wanted = check_setting(SearchSettings, "n_results", n_results, "n_results")
        keys = [AnswerKey(_cleaned(query), wanted, words) for query in queries]
        await self.opened()
        if self.store is None or self._lookup is None:
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

    def showing(self, n_results: int | None, max_passage_words: int | None) -> SearchTool:
        """:meth:`search` with other arguments, for one of several models that share it."""
        given = {"n_results": n_results, "max_passage_words": max_passage_words}
        return partial(self.search, **{name: value for name, value in given.items() if value is not None})

    def _words(self, max_passage_words: int | None) -> int | None:
        return self.settings.max_passage_words if max_passage_words is None else max_passage_words or None

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
        self._opening, self._beside, self.store, self._lookup = anyio.Lock(), set(), None, None

    async def _close(self) -> None:
        store, self.store = self.store, None
        if self._lookup is not None:
            self._lookup.close()
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as closing:
                for each in (self._answers, self.embedder, store):  # the last one closes first
                    if each is not None:
                        closing.push_async_callback(each.aclose)


class _Opening:
    """A search that is being opened, for those who wait for it; ``among`` holds it during its block."""

    def __init__(self, tell: Notify, among: set[_Opening]) -> None:
        self._tell, self._among = tell, among
        self._is_over = anyio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        if self._timer is None:
            text = "waiting until the search is open"
            self._timer = asyncio.get_running_loop().call_later(REPORT_AFTER, self._tell, text)
        await self._is_over.wait()

    def end(self) -> None:
        self._among.discard(self)
        self._is_over.set()
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> Self:
        self._among.add(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()


def _cleaned(query: str) -> str:
    if (cleaned := clean_query(query)) is None:
        raise SearchError(
            f"invalid query of {len(query)} characters: it has no letter or digit, or more than {MAX_QUERY_CHARACTERS} "
            "characters (check with clean_query first)"
        )
    return cleaned

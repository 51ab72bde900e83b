"""Records a search, so that a later session can recreate it and check that it gives the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from searchr1_async.episodes.play import SearchTool
from searchr1_async.errors import ConfigurationError
from searchr1_async.search.index import LocalIndex
from searchr1_async.search.search import Search


def record_of(search: Search) -> dict[str, Any]:
    """A search as JSON values. Reads the whole corpus: call it in a worker thread. Raises CorpusError."""
    source = search.source
    return {
        "fingerprint": search.fingerprint,
        "embedder": search.embedder.name,
        "source": source.corpus.source if isinstance(source, LocalIndex) else source.name,
        "passages": len(source.corpus) if isinstance(source, LocalIndex) else None,
        "n_results": search.settings.n_results,
        "max_passage_words": search.settings.max_passage_words,
        "description": search.description,
    }


def search_of(record: Mapping[str, Any], search: Search | None, owner: str) -> Search:
    """The search of a record. Reads the whole corpus: call it in a worker thread.

    Args:
        record: from :func:`record_of`.
        search: the given one; None recreates it from the record's description.
        owner: of the record, for messages: ``the manifest``.

    Raises:
        ConfigurationError: no description and no search given, or the search gives other answers.
        CorpusError, EmbeddingError, StoreError: as :meth:`Search.from_description`.
    """
    if search is None:
        if record["description"] is None:
            raise ConfigurationError(
                f"{owner} cannot describe its search ({record['source']}, {record['embedder']}): pass the search"
            )
        search = Search.from_description(record["description"])
    if search.fingerprint != record["fingerprint"]:
        raise ConfigurationError(
            f"the search gives other answers than that of {owner} ({record['source']}, {record['embedder']}, "
            f"{record['n_results']} results): use the same corpus, embedder and number of results"
        )
    return search


def showing(search: Search, n_results: int | None, max_passage_words: int | None) -> SearchTool:
    """The search with another number or length of passages, for one of several models that share it.

    ``n_results`` and ``max_passage_words`` are as in :meth:`Search.search`; None for the search's default.
    """
    settings, given = search.settings, {"n_results": n_results, "max_passage_words": max_passage_words}
    own = {"n_results": settings.n_results, "max_passage_words": settings.max_passage_words or 0}
    other = {name: value for name, value in given.items() if value not in (None, own[name])}
    return partial(search.for_cleaned, **other)

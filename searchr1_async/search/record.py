"""What is written down of a search, so that another session can make it again and tell whether it gives the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from searchr1_async.errors import ConfigurationError
from searchr1_async.search.indexing import LocalIndex
from searchr1_async.search.search import Search


def record_of(search: Search) -> dict[str, Any]:
    """A search as plain JSON values. Reads a corpus whole: call it in a worker thread.

    Raises:
        CorpusError: the corpus cannot be used.
    """
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
    """The search of a record. Reads a corpus whole: call it in a worker thread.

    Args:
        record: what :func:`record_of` made.
        search: the one given; None makes it from the record's description.
        owner: who has the record, for messages: ``the manifest``.

    Raises:
        ConfigurationError: the record has no description and no search is given, or the search gives other answers.
        CorpusError, EmbeddingError, StoreError: as :meth:`Search.from_description`.
    """
    if search is None:
        if record["description"] is None:
            raise ConfigurationError(
                f"{owner} cannot describe its search ({record['source']}, {record['embedder']}): give the search"
            )
        search = Search.from_description(record["description"])
    if search.fingerprint != record["fingerprint"]:
        raise ConfigurationError(
            f"the search gives other answers than that of {owner} ({record['source']}, {record['embedder']}, "
            f"{record['n_results']} results): give the same corpus, embedder and number of results"
        )
    return search

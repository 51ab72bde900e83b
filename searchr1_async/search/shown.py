"""A view of a search with another number or length of passages."""

from __future__ import annotations

from collections.abc import Sequence

from searchr1_async.episodes.types import Passage
from searchr1_async.search.search import Search


class ShownSearch:
    """A search, owned by the caller, with another number or length of passages, for one of several models that share it.

    ``n_results`` and ``max_passage_words`` are as in :meth:`Search.search`; None for the search's default.
    """

    def __init__(self, search: Search, n_results: int | None, max_passage_words: int | None) -> None:
        self._search = search
        own_settings, given = search.settings, {"n_results": n_results, "max_passage_words": max_passage_words}
        own = {"n_results": own_settings.n_results, "max_passage_words": own_settings.max_passage_words or 0}
        self._other = {name: value for name, value in given.items() if value is not None and value != own[name]}

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        """See :meth:`Search.search`."""
        return await self._search.search(queries, **self._other)

    def clean_query(self, query: str) -> str | None:
        """See :meth:`Search.clean_query`."""
        return self._search.clean_query(query)

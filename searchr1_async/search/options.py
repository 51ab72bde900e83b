"""Options of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

from searchr1_async.boundary.settings import Count, Natural, Range, Seconds, check_settings
from searchr1_async.errors import ConfigurationError
from searchr1_async.search.pacing import PacingSettings


class SearchOptions(TypedDict, total=False):
    """Options of :class:`Search` besides embedder and store."""

    n_results: int
    """Passages per query, 1 to 100; default 3, as in the recipe."""
    max_passage_words: int | None
    """Truncates passages to so many words; None (default) keeps them whole."""
    deadline: float
    """Seconds per call, default 120, then it fails. Extended while a service is down."""
    cache_entries: int
    """Answers in memory, default 10,000 (about 3 KB each); 0 disables the cache."""
    cache_path: str | Path | None
    """File of a persistent answer cache, which processes may share; None (default) for none."""
    cache_bytes: int
    """Size of that file, default 1 GiB; evicts the least recently used answers."""
    pacing: PacingSettings
    """Pacing and retries of requests to the embedder and the store."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """:class:`SearchOptions` with defaults. Raises ConfigurationError if one is out of range."""

    n_results: Annotated[int, Range(at_least=1, at_most=100)] = 3
    max_passage_words: Count | None = None
    deadline: Seconds = 120.0
    cache_entries: Natural = 10_000
    cache_path: str | Path | None = None
    cache_bytes: Count = 1 << 30
    pacing: PacingSettings = field(default_factory=PacingSettings)

    def __post_init__(self) -> None:
        check_settings(self)


def check_n_results(n_results: int) -> None:
    """Raises ConfigurationError unless 1 to 100."""
    if not 1 <= n_results <= 100:
        raise ConfigurationError(f"n_results is {n_results}: it must be 1 to 100")

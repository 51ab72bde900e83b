"""What a search can be given besides its embedder and its store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

from searchr1_async.boundary.settings import Count, Natural, Range, Seconds, check_settings
from searchr1_async.errors import ConfigurationError
from searchr1_async.search.pacing import PacingSettings


class SearchOptions(TypedDict, total=False):
    """What every :class:`Search` can be given besides its embedder and its store."""

    n_results: int
    """Passages for each query, 1 to 100; 3 by default, as in the recipe."""
    max_passage_words: int | None
    """Passages are cut after so many words; None (the default) leaves them whole."""
    deadline: float
    """Seconds from asking to answer, 120 by default, after which a call fails. Put off while a service is down."""
    cache_entries: int
    """Answers in memory, 10,000 by default (about 3 KB each); 0 keeps none."""
    cache_path: str | Path | None
    """A file for answers that outlives the process and may be shared by several; None (the default) keeps none."""
    cache_bytes: int
    """Of that file, 1 GiB by default; what was asked for least recently goes first."""
    pacing: PacingSettings
    """How requests to the embedder and to the store are paced, retried and given up."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """:class:`SearchOptions` with their defaults, checked.

    Raises:
        ConfigurationError: a setting out of its range.
    """

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
    """Refuses what no store is asked for.

    Raises:
        ConfigurationError: not 1 to 100.
    """
    if not 1 <= n_results <= 100:
        raise ConfigurationError(f"n_results is {n_results}: give 1 to 100")

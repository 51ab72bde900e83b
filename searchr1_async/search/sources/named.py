"""How a source of existing vectors identifies their embedder."""

from __future__ import annotations

from pathlib import Path

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.choice import make_embedder


def lasting_name(embedder: str | Path | Embedder | None) -> str | None:
    """The embedder's name, absolute if it is a folder; None for an embedder object, which has no such name."""
    if not isinstance(embedder, str | Path):
        return None
    place = absolute_path(embedder, "embedder")
    return str(place) if place.is_dir() else str(embedder)


def named_embedder(embedder: str | Path | Embedder | None) -> tuple[str | None, str | None]:
    """The embedder's name and fingerprint; None where unknown.

    Raises:
        ConfigurationError, EmbeddingError: see :func:`~searchr1_async.search.embedders.choice.make_embedder`.
    """
    if embedder is None:
        return None, None
    return lasting_name(embedder), make_embedder(embedder).fingerprint

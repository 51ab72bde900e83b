"""What a source whose vectors are made says of the embedder that made them."""

from __future__ import annotations

from pathlib import Path

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.choice import make_embedder


def lasting_name(embedder: str | Path | Embedder | None) -> str | None:
    """By which it can be made again, whatever the folder that is worked in; None where it is no name."""
    if not isinstance(embedder, str | Path):
        return None
    place = absolute_path(embedder, "embedder")
    return str(place) if place.is_dir() else str(embedder)


def named_embedder(embedder: str | Path | Embedder | None) -> tuple[str | None, str | None]:
    """Its name, where it can be made again by it, and its fingerprint; None and None where it is not known.

    Raises:
        ConfigurationError, EmbeddingError: as :func:`~searchr1_async.search.embedders.choice.make_embedder`.
    """
    if embedder is None:
        return None, None
    return lasting_name(embedder), make_embedder(embedder).fingerprint

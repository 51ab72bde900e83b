"""Validates an embedder's output: a malformed result is a bug, which a retry does not fix."""

from __future__ import annotations

from typing import Any

import numpy as np

from searchr1_async.errors import EmbeddingError
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.faults import RefusedInput


def checked_vectors(vectors: Any, texts: int, embedder: Embedder) -> Vectors:
    """The output of an open embedder for so many texts as ``[texts, dimension]``, float32. Takes arrays, tensors and lists.

    Raises:
        EmbeddingError: not one finite vector per text; fatal.
        RefusedInput: only some vectors are not finite, so the texts should be sent separately.
    """
    expected = f"{embedder.name} must return an array [{texts}, {embedder.dimension}] of finite numbers"
    try:
        found = np.asarray(vectors, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that needs gradients
        raise EmbeddingError(
            f"{expected}, one row per text; it returned an invalid {type(vectors).__name__} ({error})",
            is_fatal=True,
        ) from error
    if found.shape != (texts, embedder.dimension):
        raise EmbeddingError(
            f"{expected}, one row per text; it returned {list(found.shape)}: fix embed_queries and embed_passages, or "
            "`dimension`",
            is_fatal=True,
        )
    is_usable = np.isfinite(found).all(axis=1)
    if texts > 1 and not is_usable.any():
        raise EmbeddingError(f"{expected}; it returned NaN or infinity in every row", is_fatal=True)
    if not is_usable.all():
        bad = int((~is_usable).sum())
        raise RefusedInput(f"{expected}; it returned NaN or infinity for {bad} of {texts} texts")
    return found

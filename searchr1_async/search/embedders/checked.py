"""What an embedder answers, checked once: a wrong answer of a program is no outage, and trying again does not mend it."""

from __future__ import annotations

from typing import Any

import numpy as np

from searchr1_async.errors import EmbeddingError
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.faults import RefusedInput


def checked_vectors(vectors: Any, texts: int, embedder: Embedder) -> Vectors:
    """The vectors of some texts as ``[texts, dimension]``, float32.

    Args:
        vectors: what the embedder returned: an array, a tensor, or lists of numbers.
        texts: that it was given.
        embedder: open.

    Raises:
        EmbeddingError: it is not one vector of finite numbers for each text; fatal.
        RefusedInput: some of the vectors hold numbers that are not finite: the texts fare better apart.
    """
    expected = f"{embedder.name} must return an array [{texts}, {embedder.dimension}] of finite numbers"
    try:
        found = np.asarray(vectors, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that needs gradients
        raise EmbeddingError(
            f"{expected}, one row a text; it returned {type(vectors).__name__} that is no such array ({error})",
            is_fatal=True,
        ) from error
    if found.shape != (texts, embedder.dimension):
        raise EmbeddingError(
            f"{expected}, one row a text; it returned {list(found.shape)}: mend embed_queries and embed_passages, or its "
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

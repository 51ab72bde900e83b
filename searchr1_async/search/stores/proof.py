"""An index that opens proves itself: by sizes and checksums where they were kept, and by finding some of its own passages.

Vectors that were zeroed, cut or lost give wrong passages without an error, so no index is trusted by its number of rows.
"""

from __future__ import annotations

import logging

import numpy as np

from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric, Store

logger = logging.getLogger(__name__)

SAMPLE = 16
"""Vectors of the index that are searched for when it is opened."""
WITHIN = 10
"""A vector counts as found if a passage at its own place is among so many nearest ones."""
LEAST_FOUND = 0.5
"""Of the sample. Damaged indexes found 13 to 49 % of what was asked, whole ones 99 % of their own vectors."""
EXPECTED_FOUND = 0.9
"""Of the sample; below it a warning is logged: a graph that is too sparse finds less, too."""
_TOLERANCE = 0.02
"""Of similarity: vectors may be kept as 8-bit numbers."""


class DamagedIndexError(StoreError):
    """Files of an index are not what they were when it was made.

    Args:
        fault: which file, and what is wrong with it.
        advice: how to get a whole index again.
    """

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}. {advice}", is_fatal=True)
        self.fault = fault
        self.advice = advice


async def refuse_unproven(store: Store, vectors: Vectors, metric: Metric, advice: str) -> None:
    """Searches an open store for vectors of its own.

    A vector counts as found by the similarity of what comes back, not by the passage's id, since a corpus may hold equal
    passages.

    Args:
        vectors: ``[vectors, dimension]``, as the store keeps them; none prove nothing.
        metric: of the store.
        advice: how to get a whole index again.

    Raises:
        DamagedIndexError: fewer than :data:`LEAST_FOUND` of them are found.
        PassingFault: the store does not answer now.
    """
    if not len(vectors):
        return
    products = np.einsum("vd,vd->v", vectors, vectors)
    own = products if metric == "ip" else np.ones(len(vectors), np.float32)
    found = 0
    for start in range(0, len(vectors), store.max_queries):
        part = slice(start, start + store.max_queries)
        try:
            answers = await store.query(vectors[part], WITHIN)
        except StoreError as error:
            raise DamagedIndexError(
                f"{store.name} is damaged: it fails on its own vectors ({error})", advice
            ) from error
        best = [max((passage.score for passage in passages), default=-np.inf) for passages in answers]
        found += int((np.array(best) >= own[part] - _TOLERANCE * np.maximum(1, np.abs(own[part]))).sum())
    share = found / len(vectors)
    if share < LEAST_FOUND:
        raise DamagedIndexError(
            f"{store.name} is damaged: of {len(vectors)} of its own vectors it finds {found}, at least "
            f"{LEAST_FOUND:.0%} should be found",
            advice,
        )
    if share < EXPECTED_FOUND:
        logger.warning(
            "%s finds %d of %d of its own vectors: its graph is sparse (raise ef_search), or it is damaged",
            store.name,
            found,
            len(vectors),
        )

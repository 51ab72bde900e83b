"""Opens an embedder or a store, with a few retries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from searchr1_async.errors import EmbeddingError, SearchError, StoreError
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.base import Store

OPENING_TRIES = 5
"""About 4 seconds in total with the default pauses."""


async def open_embedder(embedder: Embedder, pacing: PacingSettings) -> None:
    """Opens the embedder. Few retries: the fault may be transient, but also a wrong address. Raises EmbeddingError."""
    await _opened(embedder.open, pacing, EmbeddingError)


async def open_store(store: Store, pacing: PacingSettings) -> None:
    """Opens the store, like :func:`open_embedder`. Raises StoreError."""
    await _opened(store.open, pacing, StoreError)


async def _opened(request: Callable[[], Awaitable[None]], pacing: PacingSettings, failure: type[SearchError]) -> None:
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(PassingFault),
        wait=wait_random_exponential(multiplier=2 * pacing.first_pause, max=pacing.longest_pause),
        stop=stop_after_attempt(OPENING_TRIES),
        sleep=anyio.sleep,
        reraise=True,
    )
    try:
        async for attempt in retrying:
            with attempt:
                await request()
    except PassingFault as fault:
        raise failure(str(fault)) from fault
